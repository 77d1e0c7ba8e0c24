"""Which search a request is answered by, and which of its fields that ignores."""

from typing import Any

import pytest

from llava_cot_jax import cli
from llava_cot_jax.errors import UserError
from llava_cot_jax.search.options import add_arguments
from llava_cot_jax.search.scorers import Judge, LogProbability, Verifier
from llava_cot_jax.search.strategies import BestOfN, Greedy, MajorityVote, Sample, StageBeam, WeightedVote
from llava_cot_jax.serving.api_errors import ApiError
from llava_cot_jax.serving.searches import SearchMenu
from tests.serving.test_chat_request import read


def menu(*arguments: str, most: int = 16, accepts_any: bool = False) -> SearchMenu:
    parser = cli.Parser("serve")
    add_arguments(parser)
    return SearchMenu(parser.parse_args([*arguments]), "m", most, accepts_any)


def chosen(of: SearchMenu, **fields: Any) -> tuple[Any, tuple[str, ...]]:
    found = of.choose(read(**fields))
    return found.strategy, found.ignored


def test_without_a_search_a_request_gives_the_temperature():
    """Temperature 0 takes the likeliest tokens. What is not given is the server's."""
    plain = menu("--top_k", "20", "--max_new_tokens", "30")
    assert chosen(plain) == (Greedy(30), ())
    assert chosen(plain, temperature=0, top_p=0.5) == (Greedy(30), ())
    assert chosen(plain, temperature=0.7) == (Sample(0.7, 30, 20, 1.0), ())
    warm = menu("--temperature", "0.4", "--top_p", "0.8")
    assert chosen(warm) == (Sample(0.4, None, None, 0.8), ())
    assert chosen(warm, temperature=0) == (Greedy(), ())
    assert chosen(warm, top_p=0.5) == (Sample(0.4, None, None, 0.5), ())
    assert chosen(warm, model="m:sample", temperature=0.9)[0] == Sample(0.9, None, 50, 0.8)


def test_a_search_with_candidates_keeps_its_own_sampling():
    """With the temperature 0, all candidates would be the same."""
    beam = menu("--search", "stage_beam", "--num_candidates", "2", "--judge", "verifier", "--max_new_tokens", "40")
    expected = StageBeam(2, Verifier(), max_new_tokens=40)
    assert chosen(beam, temperature=0, top_p=0.1) == (expected, ("temperature", "top_p"))
    assert chosen(beam, model="m:greedy", temperature=0.7) == (Greedy(), ("temperature",))


def test_a_name_has_the_options_that_mean_the_same_for_it():
    beam = menu("--search", "stage_beam", "--judge", "log_probability", "--temperature", "[0.1,0.2,0.3,0.4]")
    assert chosen(beam, model="m:stage_beam-3")[0] == StageBeam(3, LogProbability(), (0.1, 0.2, 0.3, 0.4))
    assert chosen(beam, model="m:best_of_n-5")[0] == BestOfN(5, LogProbability())
    assert chosen(beam, search="weighted_vote")[0] == WeightedVote()
    votes = menu("--search", "majority_vote", "--num_candidates", "6", "--max_new_tokens", "50", "--temperature", "0.8")
    assert chosen(votes, model="m:majority_vote")[0] == MajorityVote(6, 0.8, 50)
    assert chosen(votes, search="best_of_n-2")[0] == BestOfN(2, Judge(), 0.8, 50)
    assert chosen(votes, search="stage_beam")[0] == StageBeam(6, temperature=0.8)


REFUSED = {
    "another model": ({"model": "x"}, 404, "there is no model 'x': this server has m"),
    "part of a name": ({"model": "mm"}, 404, "there is no model 'mm'"),
    "another search": ({"model": "m:best"}, 404, "there is no search 'best'"),
    "no number": ({"model": "m:stage_beam-x"}, 404, "there is no search 'stage_beam-x'"),
    "no candidates": ({"model": "m:stage_beam-0"}, 400, "num_candidates is 0"),
    "candidates of one answer": ({"search": "greedy-2"}, 404, "takes no number of candidates"),
    "too many": ({"search": "best_of_n-17"}, 400, "more than 16 candidates"),
    "a search by sentences": ({"search": "sentence_beam-2"}, 400, "is not served"),
    "a retracing one": ({"search": "retracing"}, 400, "is not served"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_search_that_there_is_not(name):
    fields, status, message = REFUSED[name]
    with pytest.raises(ApiError, match=message) as caught:
        menu().choose(read(**fields))
    assert caught.value.status == status


def test_any_model_where_that_is_asked_for():
    lenient = menu(accepts_any=True)
    assert chosen(lenient, model="gpt-4-1106-preview")[0] == Greedy()
    assert chosen(lenient, model="meta/llama:latest")[0] == Greedy()
    assert chosen(lenient, model="x:majority_vote-2")[0] == MajorityVote(2)
    assert chosen(menu(), model="")[0] == Greedy()


def test_a_server_cannot_have_a_search_that_answers_nothing_side_by_side():
    with pytest.raises(UserError, match="--search retracing answers no questions side by side"):
        menu("--search", "retracing")
