"""A masked, packed batch in transformers and in TRL: the loss and gradients of answers, of the same rows and of each conversation alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from test_chat_templates import save_model
from test_llama_tokenizers import trained
from trl import SFTConfig, SFTTrainer

from milepost import ckpt
from milepost.ckpt.restore import build_model
from milepost.text import tokenization
from milepost.text.corpus import open_corpus
from milepost.text.examples import prepare_examples
from milepost.text.packing import packed, validation_batches
from milepost.text.scan import scan

pytestmark = pytest.mark.exchange

T = 700
# With the tags by which transformers, and TRL with it, find what an assistant writes.
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def rows() -> list[list[dict[str, str]]]:
    lines = Path("data/ask_wren.jsonl").read_text(encoding="utf-8").splitlines()[:10]
    pairs = [json.loads(line) for line in lines]
    return [pair["messages"] if "messages" in pair else as_messages(pair) for pair in pairs]


def as_messages(pair: dict[str, str]) -> list[dict[str, str]]:
    return [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair["completion"]}]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same random model and conversations in both programs; ours packed into as few windows as they fit."""
    folder = tmp_path_factory.mktemp("packed")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=trained("SmolLM2"), eos_token="<|im_end|>")
    tokenizer.chat_template = MARKED
    torch.manual_seed(2)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=T, initializer_range=0.2,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).double()
    save_model(tokenizer, folder)
    theirs.save_pretrained(folder)
    record = ckpt.load(folder)
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows()), encoding="utf-8")
    ours, corpus = tokenization.from_dict(record.tokenizer or {}), open_corpus(str(source), data_dir=folder)
    split = prepare_examples(
        corpus, scan(corpus), ours, template=ours.chat_template, validation_fraction=0, cache_dir=folder / "cache"
    )
    packing = packed(split.train, block_size=T, pack=True, answers=True)
    (batch,) = validation_batches(packing, batch_size=packing.windows, steps=1, positions=True)
    model = build_model(record, device=torch.device("cpu")).double().train()
    return {"theirs": theirs, "tokenizer": tokenizer, "model": model, "batch": batch, "packing": packing}


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name.removeprefix("model."): p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_equal(case: dict[str, Any], loss: torch.Tensor) -> None:
    """The loss and every gradient to 1e-5 of transformers' `loss`."""
    model, (x, y, positions) = case["model"], case["batch"]
    ours = model(x, y, positions).loss
    assert ours.item() == pytest.approx(loss.item(), abs=1e-5)
    found, expected = gradients(model, ours), gradients(case["theirs"], loss)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5, msg=name)


def test_the_packed_rows_have_transformers_loss_and_gradients(case: dict[str, Any]) -> None:
    x, y, positions = case["batch"]
    assert case["packing"].windows < len(case["packing"].used)  # several conversations share a row
    assert 0 < (y >= 0).sum() < (positions > 0).sum()  # only answers count
    labels = torch.where(y < 0, -100, y)
    theirs = case["theirs"](input_ids=x, position_ids=positions, shift_labels=labels, labels=labels, use_cache=False)
    check_equal(case, theirs.loss)


def test_each_conversation_alone_has_the_loss_and_gradients_of_the_batch(case: dict[str, Any]) -> None:
    """Tokens and answers are those that transformers itself finds in the conversations, as TRL's assistant_only_loss does."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows():
        found = case["tokenizer"].apply_chat_template(
            row, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
        )
        ids, mask = found["input_ids"][:, : T + 1], torch.as_tensor(found["assistant_masks"]).view(1, -1)[:, : T + 1]
        if not mask[:, 1:].any():
            continue
        labels = torch.where(mask.bool(), ids, -100)
        total = total + case["theirs"](input_ids=ids, labels=labels, num_items_in_batch=1).loss  # the sum
        count += int(mask[:, 1:].sum())
    assert count == int((case["batch"][1] >= 0).sum())
    check_equal(case, total / count)


def test_control_without_positions_the_conversations_see_each_other(case: dict[str, Any]) -> None:
    x, y, _ = case["batch"]
    labels = torch.where(y < 0, -100, y)
    with pytest.raises(AssertionError):
        check_equal(case, case["theirs"](input_ids=x, shift_labels=labels, labels=labels, use_cache=False).loss)


# How TRL lays conversations out: one a row, all of them in one row, or several in each of some rows.
LAID_OUT: dict[str, dict[str, Any]] = {
    "padded": {"per_device_train_batch_size": 10, "max_length": T + 1},
    "padding-free": {"per_device_train_batch_size": 10, "max_length": None, "padding_free": True},
    "packed": {"per_device_train_batch_size": 1, "max_length": T + 1, "packing": True, "packing_strategy": "bfd"},
}


@pytest.mark.parametrize("name", LAID_OUT)
def test_trl_has_the_loss_and_gradients_of_the_batch(name: str, case: dict[str, Any], tmp_path: Path) -> None:
    """TRL renders, tokenizes, marks the answers, lays them out and computes the loss, all by itself."""
    here = {"output_dir": str(tmp_path), "report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True}
    case["tokenizer"].pad_token = "<|endoftext|>"
    trainer = SFTTrainer(
        model=case["theirs"],
        args=SFTConfig(assistant_only_loss=True, activation_checkpointing=False, **here, **LAID_OUT[name]),
        train_dataset=Dataset.from_list([{"messages": row} for row in rows()]),
        processing_class=case["tokenizer"],
    )
    batches = list(trainer.get_train_dataloader())
    assert ["position_ids" in batch for batch in batches] == [name != "padded"] * len(batches)
    assert (1 < len(batches) < len(rows())) == (name == "packed")  # several rows of several conversations
    count = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
    assert count == (case["batch"][1] >= 0).sum()
    losses = [trainer.compute_loss(case["theirs"], dict(batch), num_items_in_batch=count) for batch in batches]
    check_equal(case, sum(losses[1:], losses[0]))
