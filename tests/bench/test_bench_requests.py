"""Options of the command line become a request, or one sentence."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from vllm_quantkit.bench.plan import BenchPlan
from vllm_quantkit.bench.requests import BenchRequest, read_request
from vllm_quantkit.bench.serve_command import Load
from vllm_quantkit.errors import ConfigError


def test_nothing_given_is_the_default():
    assert read_request({"model": "M"}) == BenchRequest(model="M")


def test_what_is_given_goes_where_it_belongs():
    request = read_request(
        {
            "model": "M",
            "schemes": "16-bit,quantkit-fp8",
            "batches": "1, 16",
            "prompts": "128",
            "context": 2048,
            "rounds": 9,
            "together": False,
            "max_model_len": 4096,
            "tensor_parallel_size": 2,
            "enforce_eager": True,
            "additional_config": '{"quantkit": {"group_size": 64}}',
            "gate": 0.1,
            "strict": True,
            "out": Path("OUT"),
            "as_json": True,
            "quiet": False,
        }
    )
    assert request.plan == BenchPlan(batches=(1, 16), prompts=(128,), context=2048, rounds=9)
    assert dict(request.engine) == {
        "tensor_parallel_size": 2,
        "enforce_eager": True,
        "additional_config": {"quantkit": {"group_size": 64}},
    }
    assert (request.together, request.max_model_len, request.gate) == (False, 4096, 0.1)
    assert (request.strict, request.out) == (True, Path("OUT"))


def test_servers_have_options_of_their_own():
    request = read_request(
        {
            "model": "M",
            "server": ["http://a", "b=http://b"],
            "request_rate": "2,inf",
            "concurrency": 4,
            "num_prompts": 10,
            "input_len": 32,
            "output_len": 8,
            "rounds": 3,
        }
    )
    assert request.servers == ("http://a", "b=http://b")
    assert request.plan.rounds == 3
    assert request.sent == Load(
        rates=(2.0, math.inf), concurrency=4, prompts=10, input_tokens=32, output_tokens=8
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"batches": "1,x"}, "--batches '1,x': must be numbers with commas between them"),
        ({"batches": "0"}, "--batches 0: Input should be greater than or equal to 1"),
        ({"prompts": "16"}, "--prompts 16: Input should be greater than or equal to 64"),
        ({"rounds": 0}, "--rounds 0: Input should be greater than or equal to 1"),
        ({"batches": "", "prompts": ""}, "neither batches nor prompts are given"),
        ({"input_len": 0}, "--input-len 0: Input should be greater than 0"),
        ({"request_rate": "fast"}, "--request-rate 'fast': must be numbers"),
        ({"additional_config": "{"}, "--additional-config '{' is not JSON"),
        ({"additional_config": "[]"}, "must be an object"),
        ({"server": ["http://a"], "schemes": "16-bit"}, "--schemes is for engines that this"),
        ({"server": ["http://a"], "enforce_eager": True}, "--enforce-eager is for engines"),
    ],
)
def test_what_cannot_be_is_one_sentence(options, sentence):
    with pytest.raises(ConfigError) as error:
        read_request({"model": "M", **options})
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
