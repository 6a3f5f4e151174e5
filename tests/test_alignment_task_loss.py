"""PVLALossMixin: the task loss of an accumulated step is that of one large batch, whatever the model divides it by."""

import logging

import pytest
import torch
from test_alignment_trainer import (
    BLOCKS,
    WEIGHT,
    AlignedTrainer,
    collate,
    items,
    one_step,
    relative_error,
    tiny_model,
)
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Trainer,
    ViltConfig,
    ViltForQuestionAnswering,
)

from peft_read import PVLAConfig, PVLALossMixin, Stream
from peft_read.alignment.task_loss import TaskLoss

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
UNDROPPED = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
VIDEO = 6


def bert(kind, **changes):
    torch.manual_seed(0)
    return kind(BertConfig(**SIZES, **{**UNDROPPED, **changes}))


def qwen():
    torch.manual_seed(0)
    rotary = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    text = {**SIZES, "num_key_value_heads": 2, "rope_parameters": rotary}
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16, "patch_size": 4,
        "fullatt_block_indexes": [0], "window_size": 16,
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=5, video_token_id=VIDEO, vision_start_token_id=8,
        vision_end_token_id=9,
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config)


def llama_classifier():
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=3, pad_token_id=0))


def vilt():
    torch.manual_seed(0)
    config = {"image_size": 16, "patch_size": 8, "max_image_length": -1, "num_labels": 3}
    return ViltForQuestionAnswering(ViltConfig(**SIZES, **UNDROPPED, **config))


def undivided_llama():
    model = tiny_model("llama")
    model.accepts_loss_kwargs = False
    return model


MODELS = {
    "masked words": lambda: bert(BertForMaskedLM),
    "classes": lambda: bert(BertForSequenceClassification, num_labels=3),
    "regression": lambda: bert(BertForSequenceClassification, num_labels=1),
    "pooled classes": llama_classifier,
    "answers": vilt,
    "qwen": qwen,
    "undivided": undivided_llama,
    "bart": lambda: tiny_model("bart"),
    "t5": lambda: tiny_model("t5"),
    "llama": lambda: tiny_model("llama"),
}
STACKS = {
    "masked words": r"bert\.encoder\.layer\.\d+",
    "classes": r"bert\.encoder\.layer\.\d+",
    "regression": r"bert\.encoder\.layer\.\d+",
    "answers": r"vilt\.encoder\.layer\.\d+",
    "pooled classes": BLOCKS["llama"],
    "undivided": BLOCKS["llama"],
    **BLOCKS,
}


def config_of(name):
    if name == "qwen":
        return PVLAConfig(weight=WEIGHT)
    video, words = Stream(STACKS[name], tokens=slice(0, 4)), Stream(STACKS[name], tokens=slice(4, 12))
    return PVLAConfig(weight=WEIGHT, video=video, language=words)


def rows_of(name, count=12):
    """Rows with 1 to 8 labels each, or with one class, number or set of answers."""
    generator = torch.Generator().manual_seed(3)
    rows = items("bart" if name in ("bart", "t5") else "llama", count)
    for index, row in enumerate(rows):
        labels = row["input_ids"].clone()
        labels[: 11 - (index * 5) % 8] = -100
        if name in ("masked words", "qwen", "undivided", "llama"):
            row["labels"] = labels
        elif name in ("classes", "pooled classes"):
            row["labels"] = torch.tensor(index % 3)
        elif name == "regression":
            row["labels"] = torch.tensor(float(index))
        elif name == "answers":
            row["labels"] = F.one_hot(torch.tensor(index % 3), 3).float()
            row["pixel_values"] = torch.randn(3, 16, 16, generator=generator)
        if name in ("bart", "t5"):  # a label smoother takes the labels away from the model
            row["decoder_input_ids"] = F.pad(row["labels"].clamp(min=0), (1, 0))[:-1]
        if name == "qwen":
            video = torch.tensor([8, *[VIDEO] * 8, 9])
            row["input_ids"] = torch.cat([video, row["input_ids"].clamp(min=10)])
            row["labels"] = torch.cat([torch.full_like(video, -100), labels])
            row["attention_mask"] = torch.ones_like(row["input_ids"])
            row["pixel_values_videos"] = torch.randn(32, 96, generator=generator)
            row["video_grid_thw"] = torch.tensor([2, 4, 4])
            row["mm_token_type_ids"] = 2 * (row["input_ids"] == VIDEO)
    return rows


def collated(rows):
    batch = collate(rows)
    if "pixel_values_videos" in batch:
        batch["pixel_values_videos"] = batch["pixel_values_videos"].flatten(0, 1)
    return batch


def step(name, folder, *, size, accumulation, count=12, **arguments):
    return one_step(
        "llama", folder, batch_size=size, accumulation=accumulation, remove_unused_columns=False,
        train_sampling_strategy="sequential",
        **{
            "model": MODELS[name](), "config": config_of(name), "data": rows_of(name, count),
            "data_collator": collated, **arguments,
        },
    )  # fmt: skip


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", MODELS)
def test_accumulated_steps_are_those_of_one_large_batch(name, smoothing, tmp_path):
    if smoothing and name in ("regression", "answers"):
        pytest.skip("labels that are no classes cannot be smoothed")
    expected, (whole, *_) = step(name, tmp_path, size=12, accumulation=1, label_smoothing_factor=smoothing)
    for size in (1, 2, 4):
        rest = {"accumulation": 12 // size, "label_smoothing_factor": smoothing}
        actual, (log, *_) = step(name, tmp_path, size=size, **rest)
        assert relative_error(actual, expected) < 1e-6, size
        for loss in ("loss", "task_loss", "pvla_loss"):
            assert log[loss] == pytest.approx(whole[loss], rel=1e-5), (size, loss)


@pytest.mark.parametrize("name", ["masked words", "answers", "regression", "qwen"])
def test_an_unequal_last_micro_batch_counts_by_what_it_holds(name, tmp_path):
    expected, _ = step(name, tmp_path, size=11, accumulation=1, count=11)
    actual, _ = step(name, tmp_path, size=4, accumulation=3, count=11)
    assert relative_error(actual, expected) < 1e-6


def test_the_loss_of_one_large_batch_is_the_models_own(tmp_path):
    """So that the comparisons above are with what the model says, and not with a common error."""
    for name in ("masked words", "answers", "qwen"):
        own = float(MODELS[name]()(**collated(rows_of(name))).loss.detach())
        _, (log, *_) = step(name, tmp_path, size=12, accumulation=1)
        assert log["task_loss"] == pytest.approx(own, rel=1e-5), name


def test_a_first_micro_batch_without_labels_is_weighted_too(tmp_path):
    for name in ("masked words", "qwen"):
        data = rows_of(name)
        for row in data[:4]:
            row["labels"] = torch.full_like(row["labels"], -100)
        expected, _ = step(name, tmp_path, size=12, accumulation=1, data=data)
        actual, (log, *_) = step(name, tmp_path, size=2, accumulation=6, data=data)
        assert relative_error(actual, expected) < 1e-6, name
        assert log["loss"] == pytest.approx(log["task_loss"] + WEIGHT * log["pvla_loss"], rel=1e-5)


def test_labels_that_the_collator_has_shifted_count_as_they_are(tmp_path):
    def shifted(rows):
        batch = collated(rows)
        batch["shift_labels"] = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:].contiguous()
        return batch

    expected, _ = step("undivided", tmp_path, size=12, accumulation=1)
    actual, _ = step("undivided", tmp_path, size=3, accumulation=4, data_collator=shifted)
    assert relative_error(actual, expected) < 1e-6


class Dividing(LlamaForCausalLM):
    """Remembers for which `num_items_in_batch` it was run, and in which mode."""

    def forward(self, *args, num_items_in_batch=None, **kwargs):
        self.asked.append((float(num_items_in_batch), self.training, torch.is_grad_enabled()))
        return super().forward(*args, num_items_in_batch=num_items_in_batch, **kwargs)


def test_a_model_is_asked_once_in_a_training_and_only_under_accumulation(tmp_path):
    for accumulation, size in ((4, 3), (1, 12)):
        model = tiny_model("llama")
        model.__class__, model.asked = Dividing, []
        step("llama", tmp_path, size=size, accumulation=accumulation, model=model, max_steps=2)
        count = model.asked[-1][0]
        questions = [(count, False, False), (2 * count, False, False)] if accumulation > 1 else []
        assert model.asked == [*questions, *[(count, True, True)] * 2 * accumulation]


def test_the_question_leaves_random_state_and_mode_as_they_are():
    model = torch.nn.Dropout(0.5)
    before = torch.get_rng_state()

    def loss_of(items):
        assert not model.training
        return torch.rand(()) * 0 + 3.0 / items

    task_loss = TaskLoss(lambda values: values)
    task_loss.ask(model, loss_of, torch.tensor(7), torch.device("cpu"))
    assert task_loss.is_divided and model.training
    assert torch.equal(torch.get_rng_state(), before)


class RoutedLlama(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.loss = output.loss + 1.0
        return output


def test_a_loss_of_which_one_part_is_divided_is_refused(tmp_path):
    model = tiny_model("llama")
    model.__class__ = RoutedLlama
    with pytest.raises(ValueError, match=r"one part is divided .* output_router_logits=False.* loss_is_scaled_for_ga"):
        step("llama", tmp_path, size=3, accumulation=4, model=model)


class PenalisedBert(BertForMaskedLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.loss = output.loss + 1.0
        return output


def test_a_mean_of_nobody_knows_what_is_refused_with_the_way_out(tmp_path, caplog):
    refused = bert(PenalisedBert)
    with pytest.raises(ValueError, match=r"neither the mean cross-entropy .* set accepts_loss_kwargs = False"):
        step("masked words", tmp_path, size=3, accumulation=4, model=refused)
    told = bert(PenalisedBert)
    told.accepts_loss_kwargs = False
    with caplog.at_level(logging.WARNING):
        step("masked words", tmp_path, size=3, accumulation=4, model=told, max_steps=2)
    assert caplog.text.count("micro-batches count by their examples") == 1


class WithItsOwnLoss(AlignedTrainer.__mro__[2]):
    """A mean that it has divided by the accumulation steps itself, and does not say so."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = (outputs.logits - inputs["labels"][:, None]).square().mean() / self.args.gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss


class AlignedWithItsOwnLoss(AlignedTrainer.__mro__[1], WithItsOwnLoss): ...


class AlignedAndSaidSo(AlignedWithItsOwnLoss):
    loss_is_scaled_for_ga = True


def test_a_loss_of_the_trainers_own_has_to_say_whether_it_is_divided(tmp_path):
    expected, _ = step("regression", tmp_path, size=12, accumulation=1, trainer_class=AlignedWithItsOwnLoss)
    with pytest.raises(ValueError, match=r"not the model's own.* attribute loss_is_scaled_for_ga"):
        step("regression", tmp_path, size=3, accumulation=4, trainer_class=AlignedWithItsOwnLoss)
    actual, _ = step("regression", tmp_path, size=3, accumulation=4, trainer_class=AlignedAndSaidSo)
    assert relative_error(actual, expected) < 1e-6


def test_a_loss_function_of_the_users_is_left_alone(tmp_path):
    class Trainer(AlignedTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, compute_loss_func=summed, **kwargs)

    def summed(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum") / num_items_in_batch

    runs = [
        step("masked words", tmp_path, size=12 // steps, accumulation=steps, trainer_class=Trainer)[0]
        for steps in (1, 4)
    ]
    assert relative_error(runs[1], runs[0]) < 1e-6


def test_outputs_without_names_are_refused_in_words(tmp_path):
    def unnamed(rows):
        return {**collated(rows), "return_dict": False}

    with pytest.raises(ValueError, match=r"outputs are a tuple.*take return_dict=False out of the batch"):
        step("bart", tmp_path, size=3, accumulation=4, data_collator=unnamed)
    expected, _ = step("llama", tmp_path, size=12, accumulation=1)
    actual, _ = step("llama", tmp_path, size=3, accumulation=4, data_collator=unnamed)  # divides its loss itself
    assert relative_error(actual, expected) < 1e-6


def test_evaluation_reports_the_models_own_loss(tmp_path):
    trainers = []

    class Kept(AlignedTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            trainers.append(self)

    step("masked words", tmp_path, size=3, accumulation=4, trainer_class=Kept, learning_rate=0.0)
    (trainer,) = trainers
    trainer.args.per_device_eval_batch_size = 12
    own = float(MODELS["masked words"]()(**collated(rows_of("masked words"))).loss.detach())
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == pytest.approx(own, rel=1e-5)


def test_a_model_that_draws_numbers_in_eval_mode_too_is_asked_twice_alike(tmp_path):
    class Noisy(LlamaForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, labels=None, **given):
            embedded = self.get_input_embeddings()(input_ids)
            noisy = embedded + 0.05 * torch.randn_like(embedded)
            return super().forward(inputs_embeds=noisy, attention_mask=attention_mask, labels=labels, **given)

    model = Noisy(tiny_model("llama").config)
    _, log = one_step("llama", tmp_path, batch_size=2, accumulation=2, model=model)
    assert log[0]["task_loss"] > 0


def test_a_negative_loss_of_ones_own_is_not_taken_for_none(tmp_path):
    class Below(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            return (outputs.loss - 10, outputs) if return_outputs else outputs.loss - 10

    class Aligned(PVLALossMixin, Below):
        pass

    with pytest.raises(ValueError, match="it is not known what to divide its loss by"):
        one_step("llama", tmp_path, batch_size=2, accumulation=4, trainer_class=Aligned)
