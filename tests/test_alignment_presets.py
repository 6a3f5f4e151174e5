"""`PVLAConfig()` on video-language models of transformers: their visual tokens are found from the configuration."""

import pytest
import torch
from peft import get_peft_model
from torch.utils.data import Dataset
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Trainer, TrainingArguments
from zoo.families import build_case, family_named

from peft_read import Aligner, PVLAConfig, PVLALossMixin, READConfig, Stream

VIDEO, IMAGE, START, END = 6, 5, 8, 9
LAYERS = r"model\.language_model\.layers\.\d+"


class AlignedTrainer(PVLALossMixin, Trainer):
    pass


class Numbers(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return {"index": index}


def qwen():
    """Qwen2.5-VL with videos of 2 steps of time and 4 x 4 patches, 8 tokens after the merger; the second is padded."""
    text = {
        "vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32,
        "patch_size": 4, "fullatt_block_indexes": [0], "window_size": 16,
    }  # fmt: skip
    ids = {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
    }
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids))
    video = [START, *[VIDEO] * 8, END]
    tokens = torch.tensor([[*video, 20, 21, 22], [*video, 23, 24, 0]])
    batch = {
        "input_ids": tokens,
        "attention_mask": (tokens != 0).long(),
        "labels": tokens.masked_fill(tokens < 20, -100),
        "pixel_values_videos": torch.randn(2 * 2 * 4 * 4, 3 * 2 * 4 * 4),
        "video_grid_thw": torch.tensor([[2, 4, 4]] * 2),
        "mm_token_type_ids": 2 * (tokens == VIDEO),
    }
    return model, batch, tokens == VIDEO, tokens >= 20


def internvl():
    """InternVL, which reads the frames of a video as images: its configuration has no token of videos."""
    case = build_case(family_named("internvl"))
    batch = {**case.inputs, "labels": case.inputs["input_ids"]}
    visual = batch["input_ids"] == case.model.config.image_token_id
    return case.model, batch, visual, ~visual & batch.get("attention_mask", torch.ones_like(visual)).bool()


@pytest.mark.parametrize("family", [qwen, internvl])
def test_training_aligns_visual_tokens_with_the_text(family, tmp_path):
    base, batch, visual, words = family()
    assert visual.any(1).all() and words.any(1).all()
    model = get_peft_model(base, READConfig(r=2, init_weights=False, task_type="CAUSAL_LM"))
    video, language = Stream(LAYERS, mask=lambda _: visual), Stream(LAYERS, mask=lambda _: words)
    by_hand = Aligner(model, PVLAConfig(video=video, language=language))
    with torch.no_grad(), by_hand.record() as recording:
        model.eval()(**batch)
    expected = float(by_hand.distance(recording, batch).mean())
    args = TrainingArguments(
        tmp_path, max_steps=2, logging_steps=1, per_device_train_batch_size=2, learning_rate=1e-2, save_strategy="no",
        report_to=[], remove_unused_columns=False, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = AlignedTrainer(
        model, args, train_dataset=Numbers(), data_collator=lambda _: dict(batch), pvla_config=PVLAConfig()
    )
    trainer.train()
    logged = [entry["pvla_loss"] for entry in trainer.state.log_history if "pvla_loss" in entry]
    assert logged[0] == pytest.approx(expected, rel=1e-3) and logged[1] != logged[0]


def test_markers_around_the_video_and_padding_are_on_neither_side():
    model, batch, visual, words = qwen()
    aligner = Aligner(model, PVLAConfig())
    with aligner.record() as recording:
        model(**batch)
    for block in aligner.blocks(recording, batch):
        assert torch.equal(block.video_mask, visual) and torch.equal(block.language_mask, words)
    batch["attention_mask"] = None  # no padding then
    masks = aligner.blocks(recording, batch)[0]
    assert masks.language_mask.sum() == words.sum() + 1


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "llava_onevision", "smolvlm", "video_llava"])
def test_the_blocks_of_other_families_are_found(family):
    case = build_case(family_named(family))
    aligner = Aligner(case.model, PVLAConfig())
    with torch.no_grad(), aligner.record() as recording:
        case.model(**case.inputs)
    blocks = aligner.blocks(recording, case.inputs)
    assert len(blocks) == case.model.config.get_text_config().num_hidden_layers
    ids = case.inputs["input_ids"]
    for block in blocks:
        assert torch.equal(block.video_mask.sum(1), torch.full((2,), case.placeholders))
        assert not (block.video_mask & block.language_mask).any() and block.video.shape[:2] == ids.shape


def test_models_that_read_images_elsewhere_have_no_preset():
    """Mllama's text reads images by cross-attention: the states at its image token are no image's."""
    case = build_case(family_named("mllama"))
    with pytest.raises(ValueError, match=r"model_type='mllama'.* does not put the features of images or videos"):
        Aligner(case.model, PVLAConfig())


def test_a_batch_without_token_ids_says_what_is_missing():
    model, batch, _, _ = qwen()
    aligner = Aligner(model, PVLAConfig())
    with aligner.record() as recording:
        model(**batch)
    with pytest.raises(ValueError, match="by the batch's input_ids, and it has none"):
        aligner.blocks(recording, {name: value for name, value in batch.items() if name != "input_ids"})
