"""One model over the devices of two processes, of which the first listens."""

import signal
import subprocess
import sys

import openai
import pytest

from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.processing.processor import Processor
from llava_cot_jax.search.reasoner import Reasoner
from llava_cot_jax.search.strategies import Greedy
from llava_cot_jax.search.stream import Question
from tests.processes import free_port
from tests.serving.servers import serving, user


@pytest.mark.slow
def test_the_first_process_answers_with_the_devices_of_both():
    """The answers are those of one process. SIGTERM to both ends both with 0, once the first has told the second."""
    shared = ["--hosts.divide", "model", "--hosts.coordinator", f"localhost:{free_port()}", "--hosts.count", "2"]
    shared += ["--max_new_tokens", "12", "--slots", "2", "--prompt_tokens", "64", "--images", "0"]
    command = [sys.executable, "-m", "llava_cot_jax.serve", "--checkpoint", "shapes", *shared, "--hosts.index", "1"]
    other = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        with serving(*shared, "--hosts.index", "0") as first:
            first.wait_for("serving shapes")
            client = openai.OpenAI(base_url=first.url, api_key="none", max_retries=0, timeout=120)
            questions = ["What is at a1?", "How many stars are there?"]
            found = [client.chat.completions.create(model="shapes", messages=[user(each)]) for each in questions]
            with pytest.raises(openai.BadRequestError):
                client.chat.completions.create(model="shapes", messages=[user("word " * 1500)])
            texts = [each.choices[0].model_extra["llava_cot"]["text"] for each in found]
            other.send_signal(signal.SIGTERM)
            assert first.stop() == 0
        _, errors = other.communicate(timeout=60)
        assert other.returncode == 0, errors
    finally:
        other.kill()
    reasoner = Reasoner(Mllama.from_pretrained("shapes"), Processor.from_pretrained("shapes"), Greedy(12))
    asked = [Question([user(each)]) for each in questions]
    assert texts == [each.answer.text for each in reasoner.answer_stream(asked, slots=2, prompt_tokens=64)]
