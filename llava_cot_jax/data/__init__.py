import os

# Without torch, which nothing here needs, transformers would advise to install it at every start.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
