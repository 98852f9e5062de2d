"""The families of released cascade heads as data: what they call their tensors, and how they run.

`families` finds the family of a checkpoint. Medusa's heads, Meta's and PEFT adapters, whose form differs, are in
`other_forms`. The table in docs/checkpoints.md is made of both (`python tools/families_page.py`); where published
runtimes disagree the field is in `HeadConvention.unsettled`, and that page says who does what.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mtp_mlx.drafters.heads.convention import HeadConvention


@dataclass(frozen=True)
class Names:
    """Stored names of a head. {i} is the head's number, {n} its layer's in the file, {z} its last layer's.

    norm_out is empty if the family has none. embed_tokens and lm_head may be stored, as a copy or as the head's own.
    """

    fuse: str
    norm_embedding: str
    norm_hidden: str
    norm_out: str
    block: str
    embed_tokens: str = ""
    lm_head: str = ""


@dataclass(frozen=True)
class Family:
    """A family of cascade heads.

    Attributes:
        title: what people call it.
        marker: a regular expression for stored names that no other layout has.
        layers: matches one name of each head; its group is the number of the head's layer in the file.
        owned: what every name of a head begins with ({n}: each of its layers).
        model_types: model types that it is restricted to; empty means all in `BLOCKS`.
        past_trunk: the heads are numbered on from the trunk's layers.
        setting: a key that config.json must have; empty means none.
        drafts: the key that says how many tokens the heads were trained to draft; empty means one for each head.
        as_modelled: norms are stored as the model stores its own, whatever the convention says.
        unused: a regular expression for the ends of a head's names that no runtime reads; empty means none.
        form: what the heads are, for people.
    """

    title: str
    convention: HeadConvention
    marker: str
    layers: str
    owned: str
    names: Names
    model_types: tuple[str, ...] = ()
    past_trunk: bool = False
    setting: str = ""
    drafts: str = ""
    as_modelled: bool = False
    unused: str = ""
    form: str = "cascade"


_NEXTN = Names(
    fuse="model.layers.{n}.eh_proj.weight",
    norm_embedding="model.layers.{n}.enorm.weight",
    norm_hidden="model.layers.{n}.hnorm.weight",
    norm_out="model.layers.{n}.shared_head.norm.weight",
    block="model.layers.{n}.",
    embed_tokens="model.layers.{n}.embed_tokens.weight",
    lm_head="model.layers.{n}.shared_head.head.weight",
)
_FC = Names(
    fuse="mtp.fc.weight",
    norm_embedding="mtp.pre_fc_norm_embedding.weight",
    norm_hidden="mtp.pre_fc_norm_hidden.weight",
    norm_out="mtp.norm.weight",
    block="mtp.layers.{n}.",
)
# mlx-vlm splits heads from their model under the names that they have inside their module.
_SPLIT_FC = Names(
    fuse="fc.weight",
    norm_embedding="pre_fc_norm_embedding.weight",
    norm_hidden="pre_fc_norm_hidden.weight",
    norm_out="norm.weight",
    block="layers.{n}.",
)
_QWEN = ("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text")
_GLM = HeadConvention(
    "glm-4.5", mask_first_position=True, unsettled=("recycled_hidden", "mask_first_position")
)
_MIMO = Names(
    fuse="model.mtp_layers.{n}.input_proj.weight",
    norm_embedding="model.mtp_layers.{n}.token_layernorm.weight",
    norm_hidden="model.mtp_layers.{n}.hidden_layernorm.weight",
    norm_out="model.mtp_layers.{n}.final_layernorm.weight",
    block="model.mtp_layers.{n}.",
)


def _nextn(
    title: str, convention: HeadConvention, model_types: tuple[str, ...], names: Names = _NEXTN
) -> Family:
    fuse = r"model\.layers\.(\d+)\.eh_proj\.weight"
    return Family(title, convention, fuse, fuse, "model.layers.{n}.", names, model_types, past_trunk=True)


def _fc(
    title: str, convention: HeadConvention, model_types: tuple[str, ...], form: str = "cascade"
) -> Family:
    return Family(
        title,
        convention,
        r"mtp\.fc\.weight",
        r"mtp\.layers\.(\d+)\.input_layernorm\.weight",
        "mtp.",
        _FC,
        model_types,
        form=form,
    )


def _mimo(
    title: str, convention: HeadConvention, setting: str = "", drafts: str = "", form: str = "cascade"
) -> Family:
    return Family(
        title,
        convention,
        r"model\.mtp_layers\.\d+\.",
        r"model\.mtp_layers\.(\d+)\.input_proj\.weight",
        "model.mtp_layers.",
        _MIMO,
        ("mimo", "qwen2"),
        setting=setting,
        drafts=drafts,
        form=form,
    )


FAMILIES: tuple[Family, ...] = (
    _fc(
        "Qwen3-Next / 3.5 to 3.8",
        HeadConvention("qwen", zero_centred_norms=True),
        _QWEN,
        form="cascade, dense or with experts",
    ),
    Family(
        "Qwen3-Next / 3.5 to 3.8, split from the model",
        HeadConvention("qwen", zero_centred_norms=True, unsettled=("zero_centred_norms",)),
        r"pre_fc_norm_embedding\.weight",
        r"layers\.(\d+)\.input_layernorm\.weight",
        "",
        _SPLIT_FC,
        _QWEN,
        form="cascade, dense or with experts",
    ),
    _fc("EXAONE-MoE", HeadConvention("exaone-moe"), ("exaone_moe",)),
    Family(
        "Nemotron-H",
        HeadConvention("nemotron-h"),
        r"mtp\.layers\.0\.eh_proj\.weight",
        r"mtp\.layers\.(\d+)\.eh_proj\.weight",
        "mtp.",
        Names(
            fuse="mtp.layers.{n}.eh_proj.weight",
            norm_embedding="mtp.layers.{n}.enorm.weight",
            norm_hidden="mtp.layers.{n}.hnorm.weight",
            norm_out="mtp.layers.{z}.final_layernorm.weight",
            block="mtp.layers.",
        ),
        ("nemotron_h",),
        form="cascade of two layers each",
    ),
    # One head, fine-tuned to draft several tokens in turn; its training code does not zero the first embedding.
    _mimo(
        "FastMTP",
        HeadConvention("fastmtp", stored_order="hidden"),
        setting="mtp_loss_step_weights",
        drafts="num_speculative_steps",
        form="one head, applied again for each draft",
    ),
    _mimo(
        "MiMo-7B",
        HeadConvention(
            "mimo",
            stored_order="hidden",
            first_hidden="pre-norm",
            mask_first_position=True,
            unsettled=("first_hidden", "recycled_hidden", "mask_first_position"),
        ),
    ),
    Family(
        "LongCat-Flash",
        HeadConvention("longcat-flash", embedding="own"),
        r"model\.mtp\.layers\.\d+\.enorm\.m\.weight",
        r"model\.mtp\.layers\.(\d+)\.eh_proj\.weight",
        "model.mtp.",
        Names(
            fuse="model.mtp.layers.{n}.eh_proj.weight",
            norm_embedding="model.mtp.layers.{n}.enorm.m.weight",
            norm_hidden="model.mtp.layers.{n}.hnorm.m.weight",
            norm_out="model.mtp.norm.weight",
            block="model.mtp.layers.{n}.",
            embed_tokens="model.mtp.embed_tokens.weight",
        ),
        ("longcat_flash",),
    ),
    Family(
        "MiMo-V2",
        HeadConvention("mimo-v2", recycled_hidden="trunk", unsettled=("first_hidden", "recycled_hidden")),
        r"model\.mtp\.layers\.\d+\.enorm\.weight",
        r"model\.mtp\.layers\.(\d+)\.eh_proj\.weight",
        "model.mtp.",
        Names(
            fuse="model.mtp.layers.{n}.eh_proj.weight",
            norm_embedding="model.mtp.layers.{n}.enorm.weight",
            norm_hidden="model.mtp.layers.{n}.hnorm.weight",
            norm_out="model.mtp.layers.{n}.final_layernorm.weight",
            block="model.mtp.layers.{n}.",
        ),
        ("mimo_v2_flash", "mimo_v2"),
        form="heads on the trunk's state, with a sliding window",
    ),
    Family(
        "ERNIE-4.5",
        HeadConvention(
            "ernie-4.5",
            output_norm="trunk",
            unsettled=("first_hidden", "recycled_hidden", "mask_first_position", "output_norm"),
        ),
        r"model\.mtp_linear_proj\.\d+\.weight",
        r"model\.mtp_linear_proj\.(\d+)\.weight",
        "model.mtp_",
        Names(
            fuse="model.mtp_linear_proj.{n}.weight",
            norm_embedding="model.mtp_emb_norm.{n}.weight",
            norm_hidden="model.mtp_hidden_norm.{n}.weight",
            norm_out="model.norm.weight",
            block="model.mtp_block.{n}.",
        ),
        ("ernie4_5", "ernie4_5_moe"),
        form="cascade, dense; also of models with experts",
    ),
    _nextn(
        "Step-3.5",
        HeadConvention(
            "step-3.5",
            zero_centred_norms=True,
            first_hidden="pre-norm",
            recycled_hidden="raw",
            lm_head="own",
            unsettled=("first_hidden", "recycled_hidden"),
        ),
        ("step3p5",),
        replace(
            _NEXTN,
            norm_out="model.layers.{n}.transformer.shared_head.norm.weight",
            lm_head="model.layers.{n}.transformer.shared_head.output.weight",
        ),
    ),
    _nextn(
        "GLM-4.5 / 4.6 / 4.7-Flash / 5",
        _GLM,
        ("glm4_moe", "glm4_moe_lite", "glm_moe_dsa"),
    ),
    _nextn(
        "Ling 2.0 / 2.5 / 3",
        HeadConvention("ling"),
        ("bailing_moe", "bailing_hybrid"),
        replace(_NEXTN, norm_out="model.layers.{n}.final_layernorm.weight", embed_tokens="", lm_head=""),
    ),
    Family(
        "GLM-4.7-Flash, split from the model",
        _GLM,
        r"model\.mtp_block\.",
        r"model\.mtp_block\.(\d+)\.",  # none: there is one, without a number
        "",
        Names(
            fuse="model.eh_proj.weight",
            norm_embedding="model.enorm.weight",
            norm_hidden="model.hnorm.weight",
            norm_out="model.shared_head_norm.weight",
            block="model.mtp_block.",
            embed_tokens="model.embed_tokens.weight",
            lm_head="lm_head.weight",
        ),
        ("glm4_moe_lite",),
    ),
    replace(
        _nextn(
            "Kimi K3",
            HeadConvention(
                "kimi-k3",
                first_hidden="pre-norm",
                recycled_hidden="raw",
                mask_first_position=True,
                unsettled=("mask_first_position",),
            ),
            ("kimi_k3", "kimi_linear"),
        ),
        unused=r"\.(self_attention_res|mlp_res)[_.](proj|norm)[_.]weight",
    ),
    _nextn(
        "DeepSeek-V3 / R1 / V3.2 / Kimi K2, or a dense model with heads under DeepSeek's names",
        HeadConvention("deepseek-v3", mask_first_position=True, unsettled=("mask_first_position",)),
        ("deepseek_v3", "deepseek_v32", "kimi_k2", "llama", "mistral", "qwen2", "qwen3"),
    ),
    Family(
        "speculators mtp",
        HeadConvention("speculators"),
        r"mtp_layers\.\d+\.input_proj\.weight",
        r"mtp_layers\.(\d+)\.input_proj\.weight",
        "mtp_layers.",
        Names(
            fuse="mtp_layers.{n}.input_proj.weight",
            norm_embedding="mtp_layers.{n}.token_layernorm.weight",
            norm_hidden="mtp_layers.{n}.hidden_layernorm.weight",
            norm_out="mtp_layers.{n}.final_layernorm.weight",
            block="mtp_layers.{n}.",
        ),
        as_modelled=True,
    ),
)
# Layouts that are recognised only to be refused by name.
REFUSED = {
    r"mtp\.0\.(e_proj|h_proj)\.": "DeepSeek-V4 (two fuse weights over hyper-connections)",
    r"midlayer\.": "EAGLE-3",
    r"hydra_mlp\.": "Hydra",
    r"prefix_embeding_layer\.": "Hydra++",
}
