"""Every text, image and seq2seq type of the installed transformers, tiny and random: is it equal to
eager under fastattn, or refused in one sentence? `python tests/hf_sweep.py` prints the table."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import contextlib
import dis
import functools
import signal
from dataclasses import dataclass, field

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

import fastattn.hf

LENGTH, BATCH, VOCABULARY, NEW_TOKENS = 9, 2, 99, 4
KINDS = {  # transformers' table of classes: what its inputs are, first table first
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "decoder",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": "encoder",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": "seq2seq",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": "image",
}


@functools.cache
def cases() -> dict[str, tuple[str, str, str]]:
    """{case: (type, class, kind)}, a case for each of a type's classes; its name is the type's, or
    the type's and the kind's where the type has several."""
    found, seen = {}, set()
    for table, kind in KINDS.items():
        for name, model in getattr(modeling_auto, table).items():
            model = model if isinstance(model, str) else model[0]
            if (name, model) not in seen:
                seen.add((name, model))
                found[f"{name}-{kind}" if name in found else name] = (name, model, kind)
    return found


# ---- tiny configurations -------------------------------------------------------------------------

# By the name of the field, wherever it occurs, where its default is a number.
SMALL = {
    "hidden_size_global": 32,
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "embed_dim": 32, "emb_dim": 32, "dim": 32,
    "embedding_size": 32, "word_embed_proj_dim": 32, "hidden_dim": 32, "n_inner": 48, "d_ff": 48,
    "intermediate_size": 48, "ffn_dim": 48, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "ffn_hidden_size": 48, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16, "shared_intermediate_size": 16, "d_inner": 48,
    "intermediate_size_mlp": 48, "dense_intermediate_size": 48, "attention_hidden_size": 32,
    "num_hidden_layers": 2, "num_layers": 2, "n_layer": 2, "n_layers": 2, "encoder_layers": 2,
    "decoder_layers": 2, "num_decoder_layers": 2, "num_encoder_layers": 2, "depth": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "attention_heads": 4,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_key_value_heads": 2,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8,
    "head_dim": 8, "global_head_dim": 8, "d_kv": 8, "attention_head_dim": 8, "d_head": 8,
    "dim_head": 8, "kv_channels": 8, "qk_head_dim": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "q_lora_rank": 16, "kv_lora_rank": 16,
    "index_head_dim": 16, "index_n_heads": 2, "index_topk": 4, "rotary_dim": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_head_dim": 8, "linear_num_heads": 4,
    "vocab_size": VOCABULARY, "unpadded_vocab_size": VOCABULARY, "type_vocab_size": 2,
    "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8,
    "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64, "max_seq_len": 64,
    "max_source_positions": 64, "max_target_positions": 64, "block_size": 16,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2,
    "n_group": 1, "topk_group": 1, "num_expert_group": 1, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "sliding_window": 4, "sliding_window_size": 4,
    "window_size": 4, "local_attention": 4, "attention_window": 4, "attention_chunk_size": 4,
    "chunk_size": 4, "image_size": 16, "patch_size": 4, "num_channels": 3, "num_mel_bins": 8,
    "mamba_d_state": 8, "state_size": 8, "ssm_state_size": 8, "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_num_heads": 4, "mamba_head_dim": 16, "mamba_n_groups": 1, "n_groups": 1,
    "mamba_chunk_size": 4, "time_step_rank": 4, "mamba_dt_rank": 4, "max_window_layers": 1,
    "num_nextn_predict_layers": 0, "num_kv_shared_layers": 0, "query_pre_attn_scalar": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "sep_token_id": 2, "cls_token_id": 1, "forced_eos_token_id": None, "suppress_tokens": None,
    "begin_suppress_tokens": None, "forced_bos_token_id": None, "pooler_hidden_size": 32,
    "dropout": 0.0, "hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0,
    "projection_dim": 32, "num_labels": 3, "num_nextn_layers": 0,
}  # fmt: skip
"""A dropout of any other name is 0 as well."""

# What a type needs beyond that; a key with a dot is a field of an inner configuration.
START = {"decoder_start_token_id": 1}
INDEXER = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4,
    "indexer_compress_ratio": 2,
}  # fmt: skip
HEADS = {"num_key_value_heads": 4}
CHANGES: dict[str, dict] = {
    "efficientnet": {"hidden_dim": 2560, "depth_coefficient": 0.1},
    "pvt": {"image_size": 64},
    "reformer-encoder": {"axial_pos_embds_dim": (8, 24), "axial_pos_shape": (8, 8)},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"],
                         "mamba_n_heads": 4, "mamba_d_head": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32,
                        "attention_window_size": 4, "num_key_value_heads": 1},
    "xlstm": {"num_heads": 2, "chunk_size": 16},
    "xmod": {"default_language": "en_XX"},
    "clip": {"image_size": 16},
    "t5": START, "longt5": START, "switch_transformers": START,
    "qwen4_exp_text": INDEXER, "qwen4_exp": INDEXER,
    "bit": {"hidden_sizes": [32] * 4, "depths": [1] * 4, "embedding_size": 32, "num_groups": 4},
    "blt": {"encoder_hash_byte_group_vocab": 99},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0}
            for kind in ("full_attention", "sliding_attention")
        },
    },
    "convnext": {"hidden_sizes": [16] * 4, "depths": [1] * 4},
    "convnextv2": {"hidden_sizes": [16] * 4, "depths": [1] * 4},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
             "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 48}},
    "donut-swin": {"image_size": 64, "depths": [2, 1, 1, 1], "num_heads": [2, 2, 2, 2]},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "dots3_note": HEADS,
    "dots3_note_text": HEADS,
    "esm": {"vocab_size": VOCABULARY, "token_dropout": False},
    "esmc": HEADS,
    "falcon_h1": {"mamba_d_ssm": 64},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "ministral": {"head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "levit": {"image_size": 64},
    "luke": {"entity_vocab_size": 9, "entity_emb_size": 32},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "neomme": {"head_dim": 16},
    "perceiver": {"d_latents": 32, "num_latents": 8, "num_self_attends_per_block": 2},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": (8, 24), "axial_pos_shape": (8, 8)},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2,
              "attention_hidden_size": 64, "attention_head_dim": 16, "mamba_dt_rank": 4},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2,
               "hybrid_layer_ids": [1, 3], "attention_hidden_size": 64, "attention_head_dim": 16,
               "n_mamba_heads": 4, "mamba_headdim": 16, "num_query_groups": 4,
               "num_key_value_heads": 4},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dory": {"num_hidden_layers": 6, "n_input_layers": 2, "n_recurrent_layers": 2,
             "n_output_layers": 2},
    "musicgen": {"num_codebooks": 1},
    "musicgen_melody": {"num_codebooks": 1},
    "nemo_speechlm": {"word_timestamp_config.audio_hidden_size": 32},
    "resnet": {"hidden_sizes": [16] * 4, "depths": [1] * 4},
    "segformer": {"hidden_sizes": [16] * 4, "depths": [1] * 4},
    "swin": {"image_size": 128, "depths": [2, 1, 1, 1], "num_heads": [2, 2, 2, 2]},
    "swinv2": {"image_size": 128, "depths": [2, 1, 1, 1], "num_heads": [2, 2, 2, 2]},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

SPREAD = {"mobilebert": 0.1}  # of the weights, where sdpa's gradients too are far from eager's

# Patches of bytes mix rows of padding, which see no key, into the others. Such a row gives 0 under
# sdpa and fastattn, and the mean of all values under eager.
REFERENCE = {"blt": "sdpa"}

UNBUILT: dict[str, str] = {  # types that no tiny random configuration makes, and why
    "dinat": "needs the package natten",
    "gemma3n": "needs the package timm",
    "gemma4_assistant": "reads the keys and values of another model",
    "gemma4_unified_assistant": "reads the keys and values of another model",
    "timm_wrapper": "needs the package timm",
    "shieldgemma2": "reads the logits of two words of its own vocabulary",
    "siglip2": "takes patches and their shapes instead of images",
    "voxtral_realtime": "needs a sound and a text of matching lengths",
    "vibevoice_asr": "has 690 million weights in its audio tokenizers, whatever its configuration",
}


def configuration(name: str):
    """A tiny configuration of the type, or of the part of it that the class is made of."""
    kind, model, _ = cases()[name]
    model = getattr(transformers, model)
    cls, changes = CONFIG_MAPPING[kind], CHANGES.get(name, CHANGES.get(kind, {}))
    return _shrunk(cls if issubclass(cls, model.config_class) else model.config_class, changes)


def _shrunk(cls, changes):
    default = cls()
    own = {key: x for key, x in changes.items() if "." not in key}
    fields = {}
    for key, x in vars(default).items():
        if key in own or key in getattr(default, "attribute_map", {}) or key.startswith("_"):
            continue
        if key in getattr(default, "sub_configs", {}):
            if isinstance(x, transformers.PreTrainedConfig):
                inner = {k.partition(".")[2]: v for k, v in changes.items()
                         if k.partition(".")[0] == key and "." in k}  # fmt: skip
                fields[key] = _shrunk(type(x), inner).to_dict()
        elif key in SMALL and (x is None or not isinstance(x, (list, tuple, dict, bool))):
            if x is not None or key in ("num_key_value_heads", "pad_token_id"):
                fields[key] = SMALL[key]
        elif ("drop" in key or key.endswith("pdrop")) and isinstance(x, float):
            fields[key] = 0.0
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        fields["num_key_value_heads"] = fields[
            "num_attention_heads"
        ]  # latent attention has no groups
    if "num_hidden_layers" not in own:
        fields |= _one_layer_of_each(default, fields)
    return cls(**fields | own)


def _one_layer_of_each(default, fields) -> dict:
    """Where layers differ, one of each, so that two layers do not hide a kind."""
    lists = {}
    for key in ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types"):
        x = getattr(default, key, None)
        settable = not isinstance(getattr(type(default), key, None), property)
        if (
            isinstance(x, (list, tuple))
            and settable
            and key not in getattr(default, "attribute_map", {})
        ):
            lists[key] = list(dict.fromkeys(x))
    if not lists:
        return {}
    count = max(2, *(len(x) for x in lists.values())) if lists else 2
    found = {key: (x * count)[:count] for key, x in lists.items()}
    name = getattr(default, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")
    return found | ({name: count} if name in fields else {})


def build(name: str, implementation: str = "eager"):
    """A model with random weights large enough that a wrong mask shows."""
    torch.manual_seed(0)
    model = getattr(transformers, cases()[name][1])
    model = model._from_config(configuration(name), attn_implementation=implementation).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1 or key.endswith("sinks"):
                parameter.normal_(0, SPREAD.get(name, 0.25))
    return model


# ---- probes --------------------------------------------------------------------------------------


def inputs_of(name: str, model, padding: str = "none") -> dict:
    """Inputs of a forward; `padding` says at which end row 1 is short."""
    kind = cases()[name][2]
    generator = torch.Generator().manual_seed(1)
    main = model.main_input_name

    def tokens(length=LENGTH):
        return torch.randint(3, 90, (BATCH, length), generator=generator)

    if main == "pixel_values":
        inner = getattr(model.config, "vision_config", model.config)
        size = getattr(inner, "image_size", 32)
        if not hasattr(inner, "num_attention_heads"):
            size = 64  # convolutions, which halve it many times
        size = size if isinstance(size, (list, tuple)) else (size, size)
        channels = getattr(model.config, "num_channels", 3)
        return {"pixel_values": torch.randn(BATCH, channels, *size, generator=generator)}
    if main == "input_ids":
        inputs = {"input_ids": tokens()}
    elif main == "input_values":
        inputs = {"input_values": torch.randn(BATCH, 800, generator=generator)}
    else:
        bins = getattr(model.config, "num_mel_bins", None) or 8
        shape = {"whisper": (BATCH, bins, 128)}.get(name, (BATCH, 64, bins))
        inputs = {main: torch.randn(shape, generator=generator)}
    if name == "blt":
        inputs["use_cache"] = False
    if padding != "none":
        mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
        mask[1, slice(-3, None) if padding == "right" else slice(0, 3)] = 0
        inputs["attention_mask"] = mask
    if kind == "seq2seq" and model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens(7)
    return inputs


def main_output(out) -> torch.Tensor:
    """The logits, or what there is instead of them."""
    for key in ("logits", "prediction_logits", "last_hidden_state", "spectrogram"):
        if isinstance(getattr(out, key, None), torch.Tensor):
            return getattr(out, key)
    return next(x for x in out.to_tuple() if isinstance(x, torch.Tensor) and x.dim() > 1)


def forward(model, inputs, gradients=False):
    """The output rows that are no padding, and every parameter's gradient."""
    out = main_output(model(**inputs))
    mask = inputs.get("attention_mask")
    if mask is not None and "decoder_input_ids" not in inputs and out.shape[:2] == mask.shape:
        out = out[mask.bool()]
    found = {"output": out.detach()}
    if gradients:
        model.zero_grad()
        finite = torch.where(out.isfinite(), out, 0)  # some mask logits with -inf
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
        (finite * weights).sum().backward()
        found |= {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
    return found


def last_token_changed(model, inputs):
    """What the output's earlier rows show of the last token: nothing, if the model is causal."""
    key = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    other = inputs | {key: inputs[key].clone()}
    other[key][:, -1] = 91
    with torch.no_grad():
        a, b = (main_output(model(**x)) for x in (inputs, other))
    return {"difference of earlier rows": (a - b)[:, :-1]}


def generated(model, inputs):
    inputs = {key: x for key, x in inputs.items() if key != "decoder_input_ids"}
    out = model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False,
        return_dict_in_generate=True, output_logits=True, pad_token_id=0,
    )  # fmt: skip
    return {"sequences": out["sequences"], "logits of each step": torch.stack(out["logits"])}


def probes(name: str, model) -> dict:
    """{name: function of the model that returns tensors}."""
    kind, main = cases()[name][2], model.main_input_name
    text = main == "input_ids"
    plain = inputs_of(name, model)
    found = {"gradients": lambda model: forward(model, plain, gradients=True)}
    for side in ("right", "left") if text else ():
        padded = inputs_of(name, model, side)
        found[f"padded {side}"] = functools.partial(forward, inputs=padded, gradients=True)
    if text or "decoder_input_ids" in plain:
        found["last token"] = lambda model: last_token_changed(model, plain)
    if kind in ("decoder", "seq2seq") and model.can_generate():
        found["generation"] = lambda model: generated(model, plain)
        if text:
            left = inputs_of(name, model, "left")
            found["generation, padded left"] = lambda model: generated(model, left)
    return found


# ---- verdicts ------------------------------------------------------------------------------------


@dataclass
class Verdict:
    """What became of a type. Wrong and crude are faults."""

    name: str
    word: str = "equal"  # or refused, wrong, crude, unbuilt
    why: str = ""
    calls: int = 0  # that reached fastattn
    left_out: list = field(default_factory=list)  # probes that fail under eager as well


class TooLong(Exception):
    pass


@contextlib.contextmanager
def time_limit(seconds: int):
    def stop(*_):
        raise TooLong(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def is_a_refusal(error: Exception) -> bool:
    """One sentence, which a raise of fastattn's own says: no accident on the way."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    return (
        code.co_filename.startswith(os.path.dirname(fastattn.__file__) + os.sep)
        and code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]
        and isinstance(error, (NotImplementedError, TypeError, ValueError))
        and "\n" not in str(error)
    )


def differences(got: dict, want: dict) -> str | None:
    """The first tensor that is not equal but for rounding."""
    if got.keys() != want.keys():
        return f"{sorted(got.keys() ^ want.keys())[0]} is there only once"
    gradients = {key for key in want if key not in OUTPUTS}
    largest = max((want[k].abs().max().item() for k in gradients if want[k].numel()), default=0.0)
    for key, x in want.items():
        y = got[key]
        if x.shape != y.shape:
            return f"{key} has shape {list(y.shape)} instead of {list(x.shape)}"
        if not x.is_floating_point():
            if not torch.equal(x, y):
                return f"{key} differ"
            continue
        same = (x == y) | (x.isnan() & y.isnan())
        error = torch.where(same, 0.0, (x - y).abs()).nan_to_num(nan=float("inf"))
        error = error.max().item() if error.numel() else 0.0
        finite = x[x.isfinite()]
        scale = finite.abs().max().item() if finite.numel() else 0.0
        allowed = TOLERANCE * (largest if key in gradients else max(scale, 1.0))
        if error > allowed:
            return f"{key}: off by {error:.2g}, the largest is {max(scale, largest):.2g}"
    return None


OUTPUTS = ("output", "difference of earlier rows", "sequences", "logits of each step")
TOLERANCE = 1e-3


WAYS = {  # how a model comes to fastattn; each starts from eager's weights
    "construction": lambda case: build(case, "fastattn"),
    "enable()": lambda case: fastattn.hf.enable(build(case)),
    "swap()": lambda case: _swapped(build(case)),
}


def _swapped(model):
    """swap() reports where others raise."""
    report = fastattn.swap(model)
    if model.config._attn_implementation == "fastattn":
        return model
    refused = next(why for name, _, why in report.left if name == "(model)")
    prefix = "fastattn.hf.enable() refused: "
    assert refused.startswith(prefix), refused
    raise Refused(model, refused.removeprefix(prefix))


class Refused(Exception):
    """The model, of which swap() may have served parts, and the sentence."""


def judge(case: str, counter, ways=tuple(WAYS), seconds: int = 120) -> Verdict:
    """Builds the case, and compares fastattn's way of it with eager's, probe by probe."""
    if cases()[case][0] in UNBUILT:
        return Verdict(case, "unbuilt", UNBUILT[cases()[case][0]])
    with time_limit(seconds):
        verdict = Verdict(case)
        wanted = _eagers(case, verdict)
        sentences = {way: _one_way(case, WAYS[way], wanted, verdict, counter) for way in ways}
    if not wanted and verdict.word == "equal":
        return Verdict(case, "unbuilt", verdict.left_out[0])
    if verdict.word == "refused" and len(set(sentences.values())) > 1:
        verdict.word, verdict.why = "wrong", f"refused by one and not by the other: {sentences}"
    return verdict


def _eagers(case, verdict) -> dict:
    """What each probe gives under eager."""
    model, wanted = build(case, REFERENCE.get(case, "eager")), {}
    for key, probe in probes(case, model).items():
        try:
            torch.manual_seed(0)
            wanted[key] = probe(model)
        except TooLong:
            raise
        except Exception as error:
            sentence = f"{type(error).__name__}: {error}".replace("\n", " ")
            verdict.left_out.append(f"{key} ({sentence[:150]})")
    return wanted


def _one_way(case, way, wanted, verdict, counter) -> str | None:
    """Fills the verdict in; returns the sentence in which the model was refused."""
    counter.take()
    try:
        model = way(case)
        for key, want in wanted.items():
            torch.manual_seed(0)
            wrong = differences(probes(case, model)[key](model), want)
            if wrong and verdict.word != "crude":
                verdict.word, verdict.why = "wrong", f"{key}: {wrong}"
        verdict.calls = counter.take()
        return None
    except TooLong:
        raise
    except Refused as error:
        model, sentence = error.args
        for key, want in wanted.items():
            torch.manual_seed(0)
            wrong = differences(probes(case, model)[key](model), want)
            if wrong:
                verdict.word, verdict.why = "wrong", f"refused by swap(), but {key}: {wrong}"
    except Exception as error:
        sentence = str(error)
        if not is_a_refusal(error):
            sentence = f"{type(error).__name__}: {error}".replace("\n", " ")
            verdict.word, verdict.why = "crude", sentence
    if verdict.word == "equal":
        verdict.word, verdict.why = "refused", sentence
    return sentence


# ---- the table -----------------------------------------------------------------------------------

TITLES = {
    "equal": "Equal to eager",
    "refused": "Refused",
    "unbuilt": "Not tried",
    "wrong": "Wrong",
    "crude": "Without a sentence of their own",
}


def table(verdicts: list[Verdict]) -> str:
    """Markdown: types by what becomes of them and why."""
    lines = [f"Made with transformers {transformers.__version__}.", ""]
    for word, title in TITLES.items():
        rows = [x for x in verdicts if x.word == word]
        if not rows:
            continue
        lines += [f"**{title}** ({len(rows)}).", ""]
        for reason in sorted({_reason(x) for x in rows}):
            names = ", ".join(sorted(x.name for x in rows if _reason(x) == reason))
            lines += [f"- {reason}: {names}."]
        lines += [""]
    return "\n".join(lines)


def _reason(verdict: Verdict) -> str:
    """The sentence in a few words, without the class's name."""
    if verdict.word == "equal":
        return "through fastattn" if verdict.calls else "no attention of transformers' interface"
    why = verdict.why
    for short in ("does not go through transformers' attention interface", "hands over masks"):
        if short in why:
            rest = why[why.index(short) :].partition(", so fastattn")[0]
            return rest
    return why.partition(";")[0].partition(" (")[0]


def main() -> None:
    """Prints the table; with names, one verdict a line."""
    import sys
    import warnings

    import pytest
    from hf_models import Counter

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    counter, verdicts = Counter(pytest.MonkeyPatch()), []
    for case in sys.argv[1:] or cases():
        try:
            verdict = judge(case, counter)
        except Exception as error:
            sentence = f"{type(error).__name__}: {error}".replace("\n", " ")
            verdict = Verdict(case, "unbuilt", sentence[:150])
        verdicts.append(verdict)
        print(verdict, file=sys.stderr, flush=True)
    print(table(verdicts))


if __name__ == "__main__":
    main()
