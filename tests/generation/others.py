"""More families than the zoo has, each a tiny model of its own config class: decoders, and those that also see or hear.

    OTHERS: name -> Other(config class, fields)        what it takes to build one
    build(name)                                        the model, with weights so large that attention matters

Hidden size 64, heads of 16, 2 layers (4 where kinds of layers alternate), windows of 24 tokens, experts where a family has
them. Models of several modalities get text: what their decoders do with it is what a cache is asked.
"""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

VOCAB_SIZE, WINDOW, PAD, IMAGE = 160, 24, 0, 150
_FULL, _SLIDING = "full_attention", "sliding_attention"
_COMMON: dict[str, Any] = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    pad_token_id=PAD,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
)
_EXPERTS = dict(num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
_ALTERNATING = dict(num_hidden_layers=4, sliding_window=WINDOW, layer_types=[_SLIDING, _FULL] * 2)
_VISION = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
)
_MROPE = {"rope_type": "default", "type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}


@dataclass(frozen=True)
class Other:
    """One family.

    Attributes:
        config: the config class's name in transformers.
        fields: beside the common ones.
        text: of a model of several modalities: the fields of its text config, beside the common ones.
        image: of a model that gets images of 16 × 16: how many tokens stand for one, 0 for none.
        gain: by which weights of more than one dimension are multiplied.
    """

    config: str
    fields: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] | None = None
    image: int = 0
    gain: float = 15.0


OTHERS: dict[str, Other] = {
    "afmoe": Other("AfmoeConfig", _ALTERNATING | _EXPERTS),
    "apertus": Other("ApertusConfig"),
    "arcee": Other("ArceeConfig"),
    "bitnet": Other("BitNetConfig"),
    "cohere": Other("CohereConfig"),
    "dots1": Other(
        "Dots1Config", _EXPERTS | dict(n_group=1, topk_group=1, first_k_dense_replace=1, n_shared_experts=1)
    ),
    "ernie4_5": Other("Ernie4_5Config"),
    "ernie4_5_moe": Other("Ernie4_5_MoeConfig", _EXPERTS | dict(moe_num_experts=4, moe_k=2)),
    "flex_olmo": Other("FlexOlmoConfig", _EXPERTS),
    "glm": Other("GlmConfig"),
    "glm4_moe": Other("Glm4MoeConfig", _EXPERTS | dict(n_group=1, topk_group=1, first_k_dense_replace=1)),
    "gpt_bigcode": Other("GPTBigCodeConfig", dict(n_embd=64, n_layer=2, n_head=4, n_positions=512)),
    "granitemoe": Other("GraniteMoeConfig", _EXPERTS),
    "granitemoeshared": Other("GraniteMoeSharedConfig", _EXPERTS | dict(shared_intermediate_size=32)),
    "helium": Other("HeliumConfig"),
    "hunyuan_v1_dense": Other("HunYuanDenseV1Config"),
    "jais2": Other("Jais2Config"),
    "minimax_m2": Other("MiniMaxM2Config", _EXPERTS),
    "ministral": Other("MinistralConfig", _ALTERNATING),
    "nanochat": Other("NanoChatConfig"),
    "nemotron": Other("NemotronConfig"),
    "olmo": Other("OlmoConfig"),
    "olmo3": Other("Olmo3Config", _ALTERNATING),
    "olmoe": Other("OlmoeConfig", _EXPERTS),
    "persimmon": Other("PersimmonConfig"),
    "phi": Other("PhiConfig"),
    "qwen2_moe": Other("Qwen2MoeConfig", _EXPERTS | dict(shared_expert_intermediate_size=32)),
    "seed_oss": Other("SeedOssConfig"),
    "stablelm": Other("StableLmConfig"),
    "starcoder2": Other("Starcoder2Config"),
    "vaultgemma": Other("VaultGemmaConfig", _ALTERNATING | dict(query_pre_attn_scalar=16)),
    "modernbert_decoder": Other("ModernBertDecoderConfig", dict(local_attention=WINDOW * 2)),
    "exaone_moe": Other("ExaoneMoeConfig", _ALTERNATING | _EXPERTS),
    "solar_open": Other("SolarOpenConfig", _EXPERTS | dict(n_group=1, topk_group=1)),
    "aya_vision": Other(
        "AyaVisionConfig",
        dict(
            image_token_id=IMAGE, image_token_index=IMAGE, vision_config=_VISION | {"model_type": "siglip_vision_model"}
        ),
        text=dict(model_type="cohere2") | _ALTERNATING,
        image=1,
    ),
    "gemma3": Other(
        "Gemma3Config",
        dict(image_token_id=IMAGE, image_token_index=IMAGE, vision_config=_VISION, mm_tokens_per_image=4),
        text=_ALTERNATING | dict(query_pre_attn_scalar=16),
        image=4,
    ),
    "idefics3": Other("Idefics3Config", dict(vision_config=_VISION), text=dict(model_type="llama")),
    "internvl": Other(
        "InternVLConfig",
        dict(
            image_token_id=IMAGE,
            image_token_index=IMAGE,
            image_seq_length=1,
            vision_config=_VISION | dict(image_size=[16, 16], patch_size=[8, 8]),
        ),
        text=dict(model_type="qwen2"),
        image=1,
    ),
    "llava": Other(
        "LlavaConfig",
        dict(
            image_token_id=IMAGE, image_token_index=IMAGE, vision_config=_VISION | {"model_type": "clip_vision_model"}
        ),
        text=dict(model_type="llama"),
        image=4,
    ),
    "mistral3": Other(
        "Mistral3Config",
        dict(
            image_token_id=IMAGE,
            image_token_index=IMAGE,
            spatial_merge_size=1,
            vision_config=_VISION | {"model_type": "pixtral"},
        ),
        text=dict(model_type="mistral", sliding_window=None),
        image=4,
    ),
    "qwen2_vl": Other(
        "Qwen2VLConfig",
        dict(vision_config=dict(depth=1, embed_dim=32, hidden_size=64, num_heads=2)),
        text=dict(rope_parameters=_MROPE),
    ),
    "qwen2_5_vl": Other(
        "Qwen2_5_VLConfig",
        dict(vision_config=dict(depth=1, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64)),
        text=dict(rope_parameters=_MROPE),
    ),
    "qwen3_vl": Other(
        "Qwen3VLConfig",
        dict(
            vision_config=dict(
                depth=1,
                hidden_size=32,
                intermediate_size=48,
                num_heads=2,
                out_hidden_size=64,
                deepstack_visual_indexes=[0],
            )
        ),
        text=dict(rope_parameters=_MROPE | {"mrope_interleaved": True}),
    ),
    "qwen3_vl_moe": Other(
        "Qwen3VLMoeConfig",
        dict(
            vision_config=dict(
                depth=1,
                hidden_size=32,
                intermediate_size=48,
                num_heads=2,
                out_hidden_size=64,
                deepstack_visual_indexes=[0],
            )
        ),
        text=_EXPERTS | dict(rope_parameters=_MROPE | {"mrope_interleaved": True}),
    ),
    "smolvlm": Other("SmolVLMConfig", dict(vision_config=_VISION), text=dict(model_type="llama")),
    "glm4v": Other(
        "Glm4vConfig",
        dict(vision_config=dict(depth=1, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64)),
        text=dict(rope_parameters=_MROPE | {"mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}),
    ),
    "got_ocr2": Other(
        "GotOcr2Config",
        dict(
            vision_config=dict(
                hidden_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=32,
                patch_size=8,
                output_channels=16,
                mlp_dim=32,
            )
        ),
        text=dict(model_type="qwen2"),
    ),
    "llava_next": Other(
        "LlavaNextConfig",
        dict(vision_config=_VISION | {"model_type": "clip_vision_model"}),
        text=dict(model_type="llama"),
    ),
    "gemma4": Other(
        "Gemma4Config",
        dict(),
        text=_ALTERNATING | dict(vocab_size_per_layer_input=VOCAB_SIZE, hidden_size_per_layer_input=16),
    ),
    "deepseek_vl": Other("DeepseekVLConfig", dict(vision_config=_VISION), text=dict(model_type="llama")),
    "cohere2_vision": Other(
        "Cohere2VisionConfig",
        dict(vision_config=_VISION | {"model_type": "siglip_vision_model"}),
        text=dict(model_type="cohere2") | _ALTERNATING,
    ),
}


def build_config(name: str) -> Any:
    """A fresh config."""
    entry, made = OTHERS[name], getattr(transformers, OTHERS[name].config)
    if entry.text is None:
        config = made(**{**_COMMON, **entry.fields})
    else:
        config = made(text_config={**_COMMON, **entry.text}, **entry.fields)
    return config


def build(name: str) -> PreTrainedModel:
    """A fresh float32 model, with the same weights every time."""
    torch.manual_seed(zlib.crc32(name.encode()))
    kind = AutoModelForCausalLM if OTHERS[name].text is None else AutoModelForImageTextToText
    attention = "eager" if name == "vaultgemma" else None  # older transformers let "sdpa" ignore its softcap
    model = kind.from_config(build_config(name), dtype=torch.float32, attn_implementation=attention)
    with torch.no_grad():
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                if parameter.dim() > 1 and not isinstance(module, nn.Embedding):
                    parameter.mul_(OTHERS[name].gain)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, PAD
    return model.eval()


@functools.cache
def oracle(name: str) -> PreTrainedModel:
    """The model that runs with DynamicCache; no SpinCache ever touches it."""
    return build(name)


@functools.cache
def subject(name: str) -> PreTrainedModel:
    """Another one with the same weights."""
    return build(name)
