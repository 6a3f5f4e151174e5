"""What the study of methods fixes in advance: data, selection, averaging, seeds, and the budget of every method.

A setting is a dataset with a backbone. Each of its rows (methods) has as many configurations to choose from as every
other; they are ordered by how much was expected of them, so that a smaller budget takes the first ones. The choice is
by the mean validation figure: all configurations are run with the first tuning seed, the best two once more with the
second. The main seeds are others, so that no run is both chosen by and reported. Every run is measured at the mean of
the weights at the last 5 of 20 equally distant checkpoints; no epoch is chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

TUNING_SEEDS = (100, 101)
FINALISTS = 2  # configurations that are run with the second tuning seed
REFERENCE = "READ-PVLA"  # the row that the others are compared with
TVSUM_DOMAINS = ("BK", "BT", "DS", "FM", "GA", "MS", "PK", "PR", "VT", "VU")

Rows = Mapping[str, tuple[str, ...]]


def steps(total: int) -> str:
    """So many steps, 20 checkpoints, the mean of the last 5; with the cheaper dropout."""
    return (
        f"--max_steps {total} --save_strategy steps --save_steps {total // 20} --average_checkpoints 5 --fast_dropout"
    )


@dataclass(frozen=True)
class Backbone:
    """A pretrained model that the runs of a setting adapt; `{name}` in arguments is a place in the data folder."""

    script: str
    arguments: str
    minutes: float


@dataclass(frozen=True)
class Setting:
    """One dataset with one backbone.

    Args:
        title: of its tables.
        script: what runs, in ../reproduction.
        backbone: a name of `BACKBONES`.
        arguments: of every run.
        tune, main: further ones, of the runs that choose and of those that are reported.
        validation: the figure that chooses, in the validation part of a result.
        figures: columns of the table, by their name in the test part; the first is compared.
        rows: configurations by method; in a setting that chooses nothing, what follows the choice of `choices_of`.
        choices_of: the setting whose choices are taken over; None = it chooses itself.
        row_of: which row of that setting a row follows, where it has another name.
        seeds: main seeds, 0 to this less one.
        parts: domains, each a run.
        labelled: labelled training queries, the x axis of the low-resource curve.
        minutes: of one run on one core, to begin with; runs that have been made count instead.
    """

    title: str
    script: str
    backbone: str
    arguments: str
    validation: str
    figures: Mapping[str, str]
    rows: Rows
    tune: str = ""
    main: str = ""
    choices_of: str | None = None
    row_of: Mapping[str, str] = field(default_factory=dict)
    seeds: int = 3
    parts: tuple[str | None, ...] = (None,)
    labelled: int | None = None
    minutes: float = 4.0


# --- configurations -----------------------------------------------------------------------------------------------

COSINE = "--lr_scheduler_type cosine --warmup_steps 0.1"  # of every grounding run that says nothing else
CONSTANT = "--lr_scheduler_type constant --warmup_steps 0"


def rates(method: str, values: tuple[str, ...], schedules: tuple[str, ...] = ("", CONSTANT)) -> tuple[str, ...]:
    """Learning rates under every schedule, for methods that have little else to choose."""
    return tuple(f"--method {method} --learning_rate {v} {s}".strip() for s in schedules for v in values)


READ = "--method read --bidirectional"
PVLA = f"{READ} --pvla"
FF = r"transformer\..*\.linear[12]"
ATTENTION = r"transformer\..*attn\.out_proj"
# Twelve each. What is not said is the default: rank and width 16, PVLA of weight 0.1 and mass 0.5 on both blocks.
MOMENT_DETR: Rows = {
    "Full": (
        "--method full --learning_rate 3e-4",
        "--method full --learning_rate 1e-3",
        "--method full --learning_rate 1e-4",
        "--method full --learning_rate 3e-4 --weight_decay 0.1",
        "--method full --learning_rate 1e-3 --weight_decay 0.1",
        "--method full --learning_rate 2e-3",
        "--method full --learning_rate 3e-5",
        "--method full --learning_rate 3e-4 --weight_decay 0.01",
        "--method full --learning_rate 1e-4 --weight_decay 0.1",
        f"--method full --learning_rate 1e-4 {CONSTANT}",
        f"--method full --learning_rate 3e-4 {CONSTANT}",
        f"--method full --learning_rate 3e-5 {CONSTANT}",
    ),
    "Bias": rates("bias", ("1e-3", "3e-3", "3e-4", "1e-2", "1e-4", "3e-2")),
    "Partial": rates("partial", ("3e-4", "1e-3", "1e-4", "3e-3", "3e-5", "1e-2")),
    "Proj": rates("proj", ("1e-3", "3e-3", "3e-4", "1e-2", "1e-4", "3e-2")),
    "LoRA": (
        f"--method lora --learning_rate 1e-3 --target_modules {FF}",
        f"--method lora --learning_rate 3e-4 --target_modules {FF}",
        f"--method lora --learning_rate 1e-3 --target_modules {FF}|{ATTENTION}",
        f"--method lora --learning_rate 3e-3 --target_modules {FF}",
        f"--method lora --learning_rate 1e-3 --r 64 --target_modules {FF}",
        f"--method lora --learning_rate 1e-3 --target_modules {ATTENTION}",
        f"--method lora --learning_rate 1e-3 --r 4 --target_modules {FF}",
        f"--method lora --learning_rate 3e-3 --target_modules {FF}|{ATTENTION}",
        f"--method lora --learning_rate 3e-4 --target_modules {FF}|{ATTENTION}",
        f"--method lora --learning_rate 1e-4 --target_modules {FF}",
        f"--method lora --learning_rate 3e-3 --target_modules {ATTENTION}",
        f"--method lora --learning_rate 3e-4 --target_modules {FF} {CONSTANT}",
    ),
    "Prompt": (*rates("prompt", ("3e-3", "1e-2", "1e-3", "3e-2"), ("", "--prompt_length 30", "--prompt_length 3")),),
    "Adapter": (
        "--method bottleneck --learning_rate 1e-3",
        "--method adapter --learning_rate 1e-3",
        "--method bottleneck --learning_rate 3e-4",
        "--method bottleneck --learning_rate 3e-3",
        "--method bottleneck --learning_rate 1e-3 --r 64",
        "--method bottleneck --learning_rate 1e-3 --adapter_after attention",
        "--method adapter --learning_rate 3e-4",
        "--method adapter --learning_rate 3e-3",
        "--method adapter --learning_rate 1e-3 --r 64",
        "--method bottleneck --learning_rate 1e-3 --adapter_after feed_forward",
        "--method adapter --learning_rate 1e-3 --r 4",
        f"--method bottleneck --learning_rate 3e-4 {CONSTANT}",
    ),
    "READ": (
        f"{READ} --learning_rate 1e-3",
        "--method read --learning_rate 1e-3",
        f"{READ} --learning_rate 3e-4",
        f"{READ} --learning_rate 3e-3",
        f"{READ} --learning_rate 1e-3 --r 64",
        "--method read --learning_rate 3e-4",
        "--method read --learning_rate 3e-3",
        f"{READ} --learning_rate 1e-3 --r 4",
        rf"{READ} --learning_rate 1e-3 --target_modules transformer\.encoder\..*\.linear2",
        f"{READ} --learning_rate 1e-3 --r 32",
        f"{READ} --learning_rate 1e-3 --cell gru",
        f"{READ} --learning_rate 3e-4 {CONSTANT}",
    ),
    "READ-PVLA": (
        f"{PVLA} --learning_rate 1e-3",
        "--method read --pvla --learning_rate 1e-3",
        f"{PVLA} --learning_rate 3e-4",
        f"{PVLA} --learning_rate 1e-3 --pvla_weight 0.03",
        f"{PVLA} --learning_rate 1e-3 --r 64",
        f"{PVLA} --learning_rate 1e-3 --pvla_weight 0.3 --pvla_schedule decay",
        f"{PVLA} --learning_rate 3e-3",
        f"{PVLA} --learning_rate 1e-3 --pvla_blocks 0",
        f"{PVLA} --learning_rate 1e-3 --pvla_mass 0.25",
        rf"{PVLA} --learning_rate 1e-3 --pvla_modules transformer\.encoder\.layers\.\d+\.linear2",
        f"{PVLA} --learning_rate 1e-3 --pvla_reg 0.2",
        f"{PVLA} --learning_rate 1e-3 --pvla_distance max_cosine",
    ),
}
UMT: Rows = {
    "Full": rates("full", ("1e-4", "3e-4", "1e-3"), ("",)),
    "LoRA": rates("lora", ("1e-3", "3e-3", "3e-4"), ("",)),
    "Adapter": rates("bottleneck", ("1e-3", "3e-3", "3e-4"), ("",)),
    "READ": rates("read --bidirectional", ("1e-3", "3e-3", "3e-4"), ("",)),
    "READ-PVLA": rates("read --bidirectional --pvla", ("1e-3", "3e-3", "3e-4"), ("",)),
}
# The scripts' own defaults differ: a summariser aligns unless it is told not to.
ALONE = "--no_pvla"
ENCODER = r"model\.encoder\.layers\.\d+\.fc2"
VG_BART: Rows = {
    "Full": rates(f"full {ALONE}", ("3e-4", "1e-3", "1e-4", "3e-3"), ("",)),
    "Bias": rates(f"bias {ALONE}", ("1e-2", "3e-2", "3e-3", "1e-1"), ("",)),
    "Partial": rates(f"partial {ALONE}", ("1e-3", "3e-3", "3e-4", "1e-2"), ("",)),
    "Proj": rates(f"proj {ALONE}", ("1e-3", "3e-3", "3e-4", "1e-2"), ("",)),
    "LoRA": (
        *rates(f"lora {ALONE}", ("3e-3", "1e-2"), ("",)),
        f"--method lora {ALONE} --learning_rate 3e-3 --r 64",
        f"--method lora {ALONE} --learning_rate 1e-2 --target_modules .*layers.*(q_proj|v_proj|fc1|fc2)",
    ),
    "Prompt": (
        *rates(f"prompt {ALONE}", ("1e-2", "3e-2"), ("",)),
        f"--method prompt {ALONE} --learning_rate 1e-2 --prompt_length 30",
        f"--method prompt {ALONE} --learning_rate 1e-1",
    ),
    "Adapter": (
        *rates(f"adapter {ALONE}", ("1e-2", "3e-2"), ("",)),
        f"--method bottleneck {ALONE} --learning_rate 1e-2",
        f"--method bottleneck {ALONE} --learning_rate 3e-3",
    ),
    "READ": (
        *rates(f"read {ALONE}", ("1e-2", "3e-2"), ("",)),
        f"--method read {ALONE} --learning_rate 1e-2 --bidirectional --target_modules {ENCODER}",
        f"--method read {ALONE} --learning_rate 3e-3",
    ),
    "READ-PVLA": (
        *rates("read", ("1e-2", "3e-2"), ("",)),
        f"--method read --learning_rate 1e-2 --bidirectional --target_modules {ENCODER}",
        "--method read --learning_rate 1e-2 --pvla_weight 0.01",
    ),
}

# --- settings -----------------------------------------------------------------------------------------------------

QVHIGHLIGHTS_DATA = (
    "--train_file {qvhighlights/highlight_val_release.jsonl} --num_train_samples 700 --num_validation_samples 500 "
    "--features {features/qvhighlights_val_captions.npz} --text_encoder {text_encoder} --projection {features/pca.npz}"
)
CAPTIONS = "--captions {qvhighlights/captions_minigptv2_val.jsonl} --threshold 0.15 --max_gap 3 --num_train_epochs 5"
BACKBONES = {
    "moment_detr": Backbone("pretrain_grounding", f"{QVHIGHLIGHTS_DATA} {CAPTIONS}", 8.0),
    "umt": Backbone("pretrain_grounding", f"{QVHIGHLIGHTS_DATA} {CAPTIONS} --backbone umt", 12.0),
    "vg_bart": Backbone(
        "pretrain_summariser",
        "--corpus captions --captions {qvhighlights/captions_minigptv2_val.jsonl} "
        "--features {features/qvhighlights_val_captions.npz} --num_items 70000 --d_model 128 --ffn_dim 512",
        30.0,
    ),
}
GROUNDING = f"--pictures 0 --no_measure_before --eval_strategy no {COSINE}"
QVHIGHLIGHTS_RUN = f"{QVHIGHLIGHTS_DATA} --train_pool 700 --text_cache {{text_cache}} {GROUNDING}"
QVHIGHLIGHTS_TEST = (
    "--test_file {qvhighlights/highlight_test_with_gt.jsonl} "
    "--features {features/qvhighlights_val_captions.npz},{features/qvhighlights_test_captions.npz}"
)
MOMENTS = {
    "mAP": "MR-full-mAP",
    "R1@0.5": "MR-full-R1@0.5",
    "R1@0.7": "MR-full-R1@0.7",
    "HL mAP": "HL-min-VeryGood-mAP",
    "Hit@1": "HL-min-VeryGood-Hit1",
}
NINE = tuple(MOMENT_DETR)
CURVE = ("Full", "LoRA", "Adapter", "READ-PVLA")


QVHIGHLIGHTS = Setting(
    title="QVHighlights, Moment-DETR, 700 labelled queries",
    script="ground_moments",
    backbone="moment_detr",
    arguments=f"{QVHIGHLIGHTS_RUN} {steps(440)}",
    main=QVHIGHLIGHTS_TEST,
    validation="MR-full-mAP",
    figures=MOMENTS,
    rows=MOMENT_DETR,
    seeds=8,
    labelled=700,
)
# Others on the same queries; each has its own rows, seeds and place on the low-resource curve.
VARIATION = replace(QVHIGHLIGHTS, rows={}, seeds=Setting.seeds, labelled=Setting.labelled)


def _low_resource(labelled: int) -> Setting:
    return replace(
        VARIATION,
        title=f"QVHighlights, Moment-DETR, {labelled} labelled queries",
        main=f"{QVHIGHLIGHTS_TEST} --num_train_samples {labelled}",
        rows=dict.fromkeys(CURVE, ("",)),
        choices_of="qvhighlights",
        labelled=labelled,
    )


# In the order in which they are run; what is not finished is left out of the tables, and they say so.
SETTINGS: dict[str, Setting] = {
    "qvhighlights": QVHIGHLIGHTS,
    "umt": replace(VARIATION, title="QVHighlights, UMT, 700 labelled queries", backbone="umt", rows=UMT),
    "moments": Setting(
        title="Summaries of QVHighlights moments, VG-BART",
        script="summarise",
        backbone="vg_bart",
        arguments="--data_dir {moments_by_source} --features {moments/video_features.npz} "
        "--compare_zero_video false --measure_before false --eval_strategy no --generation_num_beams 3 "
        f"--generation_max_length 32 --max_source_length 256 --per_device_eval_batch_size 64 {steps(200)}",
        # The test split is not read where configurations are chosen.
        tune="--test_split sum_val",
        validation="rougeL",
        figures={"ROUGE-L": "rougeL", "ROUGE-1": "rouge1", "ROUGE-2": "rouge2"},
        rows=VG_BART,
        seeds=5,
        minutes=4.0,
    ),
    "low_resource_100": _low_resource(100),
    "low_resource_300": _low_resource(300),
    "tvsum": Setting(
        title="TVSum, Moment-DETR, one video of a domain held out",
        script="ground_moments",
        backbone="moment_detr",
        arguments="--dataset tvsum --train_file {tvsum/tvsum50.jsonl} --features {features/tvsum_captions.npz} "
        "--text_encoder {text_encoder} --projection {features/pca.npz} --per_device_train_batch_size 4 "
        f"{GROUNDING} {steps(40)}",
        validation="top5-mAP",
        figures={"top-5 mAP": "top5-mAP"},
        rows=dict.fromkeys(NINE, ("",)),
        choices_of="qvhighlights",
        parts=TVSUM_DOMAINS,
        minutes=1.0,
    ),
    "ablations": replace(
        VARIATION,
        title="What is aligned and what recurs: QVHighlights, Moment-DETR, 700 labelled queries",
        rows={
            "READ-PVLA": ("",),
            "no alignment (Table 6)": ("--pvla false",),
            "alignment of everything (Table 6)": ("--pvla_mass 1.0",),
            "no recurrence (Table 8)": ("--method adapter --bidirectional false",),
            "GRU (Table 8)": ("--cell gru",),
            "LSTM (Table 8)": ("--cell lstm",),
            "average, cosine (Table 9)": ("--pvla_distance avg_cosine",),
            "maximum, cosine (Table 9)": ("--pvla_distance max_cosine",),
            "average, L2 (Table 9)": ("--pvla_distance avg_l2",),
            "maximum, L2 (Table 9)": ("--pvla_distance max_l2",),
        },
        row_of={"": "READ-PVLA"},
        choices_of="qvhighlights",
        seeds=5,
    ),
}
