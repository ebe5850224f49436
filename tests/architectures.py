"""Tiny models of the architectures that Hugging Face transformers knows, for tests of the patch.

`build(name)` makes one from random weights. A name is a model type of transformers, with a suffix where a type comes
in several forms. Sizes are tiny but awkward: an odd vocabulary, softcaps and scales that are on.

    python tests/architectures.py    # writes docs/architectures.md, of which each form's test checks its own row
"""

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB = 331
_ABSENT = object()

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_k": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "n_shared_experts": 1,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip

# Names that are not the model type itself, and those that are no causal language models. The suffix _tied or _untied
# is the form that the type's own configuration does not choose.
_TYPES = {
    "bart_seq2seq": "bart", "bert_masked": "bert", "gemma3_text_softcap": "gemma3_text",
    "mixtral_router_loss": "mixtral",
}  # fmt: skip
_AUTO = {
    **dict.fromkeys(("bart_seq2seq", "mt5", "t5", "umt5"), AutoModelForSeq2SeqLM),
    "bert_masked": AutoModelForMaskedLM,
}

# What a form needs beyond the common settings, or instead of them.
_ENCODER_DECODER: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_hidden_layers": _ABSENT,
    "head_dim": _ABSENT,
}  # fmt: skip
_T5 = {
    "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "head_dim": _ABSENT,
    "decoder_start_token_id": 0,
}  # fmt: skip
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}
_PER_LAYER = {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}
_ALL_HEADS = {"num_key_value_heads": 4}
_FOUR_LAYERS = {"num_hidden_layers": 4}
_HALF_ROTARY = {"rotary_dim": 4}
_CONV_LAYERS = {"layer_types": ["conv", "full_attention"]}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_ZAMBA_LAYERS = ["mamba", "hybrid", "mamba", "hybrid", "mamba", "mamba"]

_OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots3_note_text"), _ALL_HEADS),
    **dict.fromkeys(("glm4_moe_lite", "glm_moe_dsa", "minicpm3", "youtu"), _ALL_HEADS),
    **dict.fromkeys(("bart", "bart_seq2seq", "bigbird_pegasus", "blenderbot", "blenderbot-small"), _ENCODER_DECODER),
    **dict.fromkeys(("marian", "mbart", "mvp", "pegasus", "plbart", "trocr", "whisper"), _ENCODER_DECODER),
    **dict.fromkeys(("t5", "mt5", "umt5"), _T5),
    **dict.fromkeys(("codegen", "gptj"), _HALF_ROTARY),
    "bailing_hybrid": {"num_hidden_layers": 8, "num_key_value_heads": 4},
    "bamba": {**_MAMBA2, "attn_layer_indices": [1]},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"logit_scale": 0.3},
    "cohere_compass_text": {
        "layer_types": ["full_attention", "full_attention"],
        "rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _ROPE),
    },
    "falcon": {"head_dim": _ABSENT},
    "falcon_h1": {**_MAMBA2, "mamba_d_ssm": 64, "lm_head_multiplier": 0.3},
    "gemma2": {"final_logit_softcapping": 2.0},
    "gemma3_text_softcap": {"final_logit_softcapping": 2.0},
    "gemma3n_text": {
        **_PER_LAYER,
        "layer_types": ["sliding_attention", "full_attention"],
        "laurel_rank": 8,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "gemma4_text": {**_PER_LAYER, "final_logit_softcapping": 2.0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "granite": {"logits_scaling": 4.0},
    "granitemoehybrid": {
        **_MAMBA2, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 32, "logits_scaling": 4.0,
    },
    "inkling_text": {"unpadded_vocab_size": VOCAB - 20},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4, "mamba_d_state": 8},
    **dict.fromkeys(("lfm2_moe", "lfm3"), _CONV_LAYERS),
    "longcat_flash": {
        "num_layers": 2, "num_hidden_layers": _ABSENT, "ffn_hidden_size": 64, "expert_ffn_hidden_size": 16,
        "zero_expert_num": 1, "moe_topk": 2, "num_key_value_heads": 4,
    },
    "mamba2": {"num_heads": 8, "state_size": 8, "n_groups": 1},
    "mixtral_router_loss": {"output_router_logits": True},
    "nemotron_h": {
        "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1,
        "hybrid_override_pattern": "M*-E",
    },
    **dict.fromkeys(("qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"), _FOUR_LAYERS),
    "recurrent_gemma": {"lru_width": 32, "num_hidden_layers": 3, "logits_soft_cap": 2.0},
    "xlnet": {"max_position_embeddings": _ABSENT, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
    "zamba": {"num_hidden_layers": 6, "layer_types": _ZAMBA_LAYERS, "mamba_d_state": 8, "n_mamba_heads": 2},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

# The fast tier: each way in which a model treats its logits, at least once.
FAST = (
    "llama", "llama_tied", "qwen2", "qwen3", "gemma2", "gemma3_text", "gemma3_text_softcap", "cohere", "granite",
    "gpt2", "gpt_neox", "mistral", "phi", "inkling_text", "t5", "bart_seq2seq", "bert_masked", "mamba",
)  # fmt: skip

FULL = (
    "afmoe", "apertus", "arcee", "aria_text", "axk1", "axk2", "bailing_hybrid", "bamba", "bart", "beam", "bert",
    "bert-generation", "bigbird_pegasus", "biogpt", "bitnet", "blenderbot", "blenderbot-small", "bloom", "camembert",
    "codegen", "cohere2", "cohere2_moe", "cohere_compass_text", "cpmant", "ctrl", "cwm", "data2vec-text", "deepseek_v2",
    "deepseek_v3", "deepseek_v32", "deepseek_v4", "diffllama", "doge", "dots1", "dots3_note_text", "electra", "ernie",
    "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe", "falcon", "falcon_h1", "falcon_mamba", "flex_olmo", "flint",
    "fuyu", "gemma", "gemma3n_text", "gemma4_text", "gemma4_unified_text", "glm", "glm4", "glm4_moe", "glm4_moe_lite",
    "glm_moe_dsa", "gpt-sw3", "gpt_bigcode", "gpt_neo", "gpt_neox_japanese", "gpt_oss", "gptj", "granite_swa",
    "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "helium", "hrm_text", "hunyuan_v1_dense",
    "hunyuan_v1_moe", "hy_v3", "hy_v4", "hyperclovax", "inkling2_text", "internlm3", "iquestcoder", "jais2", "jamba",
    "jetmoe", "kolibri1", "laguna", "lfm2", "lfm2_moe", "lfm3", "llama4_text", "longcat_flash", "mamba2", "marian",
    "mbart", "megatron-bert", "mellum", "mimo_v2_flash", "minicpm3", "minimax", "minimax_m2", "minimax_m3_vl_text",
    "ministral", "ministral3", "mixtral", "mixtral_router_loss", "modernbert-decoder", "moshi", "mpt", "mt5", "mvp",
    "nanochat", "nemotron", "nemotron_h", "olmo", "olmo2", "olmo3", "olmo_hybrid", "olmoe", "openai-gpt", "opt",
    "pegasus", "persimmon", "phi3", "phimoe", "plbart", "qwen2_moe", "qwen3_5_moe_text", "qwen3_5_text",
    "qwen3_moe", "qwen3_next", "recurrent_gemma", "rembert", "roberta", "roberta-prelayernorm", "roformer", "rwkv",
    "seed_oss", "smollm3", "solar_open", "stablelm", "starcoder2", "trocr", "umt5", "vaultgemma", "whisper", "xglm",
    "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet", "youtu", "zamba", "zaya",
)  # fmt: skip

TIED_OR_NOT = (
    "bart_untied", "cohere_untied", "deepseek_v2_tied", "deepseek_v3_tied", "falcon_untied", "gemma2_untied",
    "gemma3_text_untied", "gemma3n_text_untied", "gemma4_text_untied", "gemma_untied", "glm4_tied", "glm_tied",
    "gpt2_untied", "gpt_neox_tied", "gpt_oss_tied", "granite_tied", "mamba_untied", "mistral_tied", "mixtral_tied",
    "olmo2_tied", "olmo_tied", "phi3_tied", "phi_tied", "qwen2_tied", "qwen3_tied",
)  # fmt: skip

# Known to transformers, not tested, and why.
_COMPOSITE = "text with other modalities, has no tiny configuration; its text part is like the text-only models"
NOT_TESTED = {
    **dict.fromkeys(("dots3_note", "gemma3", "gemma3n", "gemma4", "gemma4_assistant", "gemma4_unified"), _COMPOSITE),
    **dict.fromkeys(("gemma4_unified_assistant", "git", "got_ocr2", "llama4", "mllama", "qwen3_5"), _COMPOSITE),
    **dict.fromkeys(("moss_transcribe_diarize", "musicgen", "musicgen_melody", "phi4_multimodal"), _COMPOSITE),
    **dict.fromkeys(("blt", "emu3", "qwen3_5_moe", "qwen4_exp"), _COMPOSITE),
    "big_bird": "draws random attention blocks: the stock model differs from itself",
    "dbrx": "its configuration class does not load in transformers 5.23",
    "kimi_linear": "no tiny configuration found",
    "prophetnet": "its loss takes log_softmax of the logits itself: they are materialised, with the warning",
    "qwen4_exp_text": "no tiny configuration found",
    "reformer": "draws random hashes: the stock model differs from itself",
    "roc_bert": "its pronunciation and shape embeddings cannot be made tiny",
    "xlstm": "no tiny configuration found",
    "xmod": "needs a default language",
    "zamba2": "no tiny configuration found",
}


def types_left_out() -> set[str]:
    """Causal language models of the installed transformers that are neither tested nor listed with a reason."""
    tested = {_form(name)[0] for name in FAST + FULL}
    return set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - tested - set(NOT_TESTED)


def _form(name: str) -> tuple[str, dict[str, Any]]:
    """The model type, and what its configuration has beyond the common settings."""
    for suffix, tied in (("_tied", True), ("_untied", False)):
        if name.endswith(suffix):
            base = name.removesuffix(suffix)
            return _TYPES.get(base, base), {**_OWN.get(base, {}), "tie_word_embeddings": tied}
    return _TYPES.get(name, name), _OWN.get(name, {})


def build(name: str) -> PreTrainedModel:
    """The model in training mode, with random weights that are the same at every call."""
    model_type, own = _form(name)
    config = AutoConfig.for_model(
        model_type, **{key: value for key, value in {**_COMMON, **own}.items() if value is not _ABSENT}
    )
    torch.manual_seed(0)
    return _AUTO.get(name, AutoModelForCausalLM).from_config(config).train()


def batch() -> dict[str, Tensor]:
    """Two sequences; the first has a masked prompt."""
    input_ids = torch.randint(3, VOCAB - 20, (2, 17), generator=torch.Generator().manual_seed(0))
    labels = input_ids.clone()
    labels[0, :5] = -100
    return {"input_ids": input_ids, "labels": labels}


DOCUMENT = Path(__file__).parent.parent / "docs" / "architectures.md"


def row(name: str, model: PreTrainedModel, logits: Any) -> str:
    """What docs/architectures.md says of a form, from the lazy logits of a training step."""
    head: Any = model.get_output_embeddings()
    form = logits._form
    terms = {
        "bias": head.bias is not None or bool(form.biases),
        "scale": form.cap is None and form.scale != 1.0,
        "softcap": form.cap is not None,
        "first rows only": form.rows < head.weight.shape[0],
    }
    embeddings: Any = model.get_input_embeddings()
    tied = "tied" if head.weight is embeddings.weight else "not tied"
    return f"| {name} | {type(model).__name__} | {tied} | {', '.join(t for t, has in terms.items() if has) or '-'} |"


def document(rows: list[str], sharded: tuple[str, ...]) -> str:
    """The text of docs/architectures.md."""
    types = {_form(name)[0] for name in FAST + FULL + TIED_OR_NOT}
    reasons = sorted(NOT_TESTED.items(), key=lambda item: (item[1], item[0]))
    grouped: dict[str, list[str]] = {}
    for name, reason in reasons:
        grouped.setdefault(reason, []).append(name)
    return "\n".join(
        [
            "# Hugging Face architectures",
            "",
            f"{len(rows)} forms of {len(types)} model types of transformers {transformers.__version__}. Each is built "
            "tiny and trained for a step as it is",
            'and patched (`gradient="exact"`), with and without `num_items_in_batch`: the losses and all gradients are '
            "equal, and",
            "no logits are computed. `python tests/architectures.py` writes this file; the tests fail where it is not "
            "up to date.",
            "",
            f"The same with the vocabulary sharded over two ranks: {', '.join(sharded)}.",
            "",
            "| form | class | classifier and embedding | logits |",
            "|---|---|---|---|",
            *rows,
            "",
            "Not tested, and why:",
            "",
            *(f"- {', '.join(names)}: {reason}" for reason, names in grouped.items()),
            "",
        ]
    )


if __name__ == "__main__":
    from test_transformers_patch import SHARDED

    from cce_dist.transformers import patch

    rows = []
    for name in sorted(FAST + FULL + TIED_OR_NOT):
        model = patch(build(name), materialize="raise")
        rows.append(row(name, model, model(**batch()).logits))
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(document(rows, SHARDED))
