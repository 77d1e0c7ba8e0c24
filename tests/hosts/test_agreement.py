"""What a run says of processes that have read different things."""

from llava_cot_jax.hosts.agreement import describe_differences, name_processes

HOSTS = {0: "a", 1: "b", 2: "c"}


def test_processes_that_have_read_the_same_have_no_difference():
    assert describe_differences({0: {"x": "1", "y": "2"}, 1: {"y": "2", "x": "1"}}, HOSTS) == ""


def test_a_difference_names_field_hosts_and_values():
    found = {0: {"rate": "1", "seed": "3"}, 1: {"rate": "2", "seed": "3"}, 2: {"rate": "1", "seed": "3"}}
    assert describe_differences(found, HOSTS) == (
        "the processes of the run differ: rate is 1 in processes 0 (a) and 2 (c) and 2 in process 1 (b). "
        "Give all of them the same"
    )


def test_a_field_that_one_process_lacks_is_a_difference():
    assert "merges.txt is missing in process 0 (a) and 77 in process 1 (b)" in describe_differences(
        {0: {}, 1: {"merges.txt": "77"}}, HOSTS
    )


def test_many_and_long_ones_are_cut_off():
    first = {str(i): "0" for i in range(6)}
    text = describe_differences({0: first, 1: dict.fromkeys(first, "x" * 500)}, HOSTS)
    assert "2 is 0 in process 0 (a) and xxx" in text and "; and 3 more" in text and "3 is" not in text
    assert len(text) < 600
    assert name_processes(range(9), {}) == "processes 0, 1, 2 and 6 more"
    assert name_processes([1, 2], HOSTS) == "processes 1 (b) and 2 (c)"
