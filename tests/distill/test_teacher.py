"""What a teacher records and finds, against loops over float64 and against the model's own attention weights."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from spin_hf import UnsupportedModelError
from spin_hf.attention.methods.seer_gates import rotate
from spin_hf.distill.teacher import LayerAttention, Teacher, page_attention
from tests.support.zoo import build_config, build_model


def test_page_attention_is_the_largest_weight_of_a_page_and_group() -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn((2, 3, 75, 8), generator=generator)
    keys = torch.randn((2, 75, 8), generator=generator)
    positions = torch.tensor([20, 31, 74])
    actual = page_attention(LayerAttention(queries, keys, 0.7, 4.0), positions, 16)
    assert actual.shape == (2, 3, 4)
    for h in range(2):
        for i, position in enumerate(positions.tolist()):
            expected = [0.0] * 4
            for g in range(3):
                scores = [
                    float(queries[h, g, position].double() @ keys[h, t].double()) * 0.7 for t in range(position + 1)
                ]
                weights = [math.exp(4.0 * math.tanh(score / 4.0)) for score in scores]
                for page in range(4):
                    inside = weights[16 * page : 16 * page + 16]
                    expected[page] = max([expected[page], *(weight / sum(weights) for weight in inside)])
            assert actual[h, i].tolist() == pytest.approx(expected, abs=1e-6)


def test_chunks_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = LayerAttention(torch.randn(1, 2, 64, 8), torch.randn(1, 64, 8), 0.3, None)
    whole = page_attention(seen, torch.arange(64), 16)
    monkeypatch.setattr("spin_hf.distill.teacher._CHUNK_LOGITS", 5 * 2 * 64)
    assert torch.allclose(page_attention(seen, torch.arange(64), 16), whole, atol=1e-7)


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_a_teacher_sees_the_attention_of_its_model(family: str) -> None:
    """Sums of weights over pages would hide a scale or softcap that is wrong; the largest do not."""
    model = build_model(family, "eager")
    teacher = Teacher(model)
    ids = torch.randint(3, 128, (48,), generator=torch.Generator().manual_seed(1))
    before = model.config._attn_implementation
    weights = model(ids[None], output_attentions=True, use_cache=False).attentions
    shown = {}
    teacher.watch(ids, lambda layer, seen: shown.update({layer: page_attention(seen, torch.arange(48), 16)}))
    assert list(shown) == teacher.layers
    for layer, actual in shown.items():
        heads = actual.shape[0]
        expected = weights[layer][0].unflatten(0, (heads, -1)).unflatten(-1, (3, 16)).amax((1, -1))
        assert torch.allclose(actual, expected, atol=1e-5)
    assert model.config._attn_implementation == before


def test_the_model_computes_what_it_always_does() -> None:
    model = build_model("gemma3_text")
    ids = torch.randint(3, 128, (70,))
    expected = model.base_model(ids[None], use_cache=False).last_hidden_state
    outputs = []
    handle = model.base_model.register_forward_hook(lambda module, args, out: outputs.append(out.last_hidden_state))
    Teacher(model).watch(ids, lambda layer, seen: None)
    handle.remove()
    assert torch.equal(outputs[0], expected)
    assert not any(parameter.requires_grad for parameter in model.parameters())


ROTATED = {
    "llama": (8, False), "qwen3": (8, False), "phi3": (8, False), "glm4": (4, True), "gemma3_text": (8, False),
    "gpt_neox": (2, False), "mixtral": (8, False),
}  # fmt: skip
"""Family -> pairs of channels that are rotated, and whether they are neighbours."""


@pytest.mark.parametrize("family", ROTATED)
def test_rotations_are_found(family: str) -> None:
    teacher = Teacher(build_model(family))
    found = teacher.find_rotations(7)
    assert list(found) == teacher.layers
    for rotation in found.values():
        assert (len(rotation.frequencies), rotation.interleaved) == ROTATED[family]
        assert rotation.frequencies[0] == 1.0


def test_layers_without_rotation_and_global_layers_with_their_own() -> None:
    nope = Teacher(build_model("smollm3"))
    assert {layer: len(found.frequencies) for layer, found in nope.find_rotations(7).items()} == {0: 8, 1: 0}
    config = build_config("gemma3_text")
    config.rope_parameters = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
    }
    model = AutoModelForCausalLM.from_config(config).eval()
    for rotation in Teacher(model).find_rotations(7).values():
        assert rotation.frequencies[:2].tolist() == pytest.approx([1 / 8, 1_000_000.0 ** (-1 / 8) / 8])


def test_llama3_frequencies_undo_the_models_rotation() -> None:
    config = build_config("llama")
    config.rope_parameters = {
        "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    teacher = Teacher(model)
    rotation = teacher.find_rotations(9)[1]
    keys = []
    handle = model.model.layers[1].self_attn.k_proj.register_forward_hook(lambda module, args, out: keys.append(out))
    teacher.watch(torch.arange(3, 103), lambda layer, seen: keys.append(seen.keys))
    handle.remove()
    before, after = keys[1], keys[2]  # layer 0 shows its keys first
    undone = rotate(after, torch.arange(100), rotation.frequencies, interleaved=False, undo=True)
    assert torch.allclose(undone, before[0].unflatten(-1, (2, 16)).transpose(0, 1), atol=1e-5)


@pytest.mark.parametrize(("family", "reason"), [("gpt2", "rotary"), ("mistral", "full attention, got none")])
def test_models_that_cannot_be_distilled(family: str, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        Teacher(build_model(family)).find_rotations(7)


def test_rotations_that_change_with_the_text_are_refused() -> None:
    config = build_config("llama")
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    with pytest.raises(UnsupportedModelError, match="does not depend on the length of the text"):
        Teacher(AutoModelForCausalLM.from_config(config)).find_rotations(7)
