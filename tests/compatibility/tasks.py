"""The task types of peft, each on a transformers model of its kind: trained one step, saved, loaded."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from peft import PeftModel, TaskType, get_peft_model
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
)

from lslora import LSLoraConfig

from .models import IDS, bend, llama, splines
from .registry import may_be_refused, operation

BERT = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
T5 = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
ROW = torch.zeros(len(IDS), dtype=torch.long)
TASKS: dict[TaskType, tuple[Any, dict[str, Any]]] = {
    TaskType.CAUSAL_LM: (llama, {"labels": IDS}),
    TaskType.SEQ_CLS: (lambda: BertForSequenceClassification(BertConfig(**BERT)), {"labels": ROW}),
    TaskType.TOKEN_CLS: (lambda: BertForTokenClassification(BertConfig(**BERT)), {"labels": IDS % 2}),
    TaskType.QUESTION_ANS: (
        lambda: BertForQuestionAnswering(BertConfig(**BERT)),
        {"start_positions": ROW, "end_positions": ROW},
    ),
    TaskType.FEATURE_EXTRACTION: (lambda: BertModel(BertConfig(**BERT)), {}),
    TaskType.SEQ_2_SEQ_LM: (
        lambda: T5ForConditionalGeneration(T5Config(**T5, decoder_start_token_id=0)),
        {"labels": IDS},
    ),
}


def base_of(task: TaskType) -> Any:
    torch.manual_seed(0)
    return TASKS[task][0]().eval()


def check_task(task: TaskType, placement: str) -> None:
    labels = TASKS[task][1]
    torch.manual_seed(1)
    config = LSLoraConfig(placement=placement, r=2, task_type=task, init_lora_weights=False)
    with may_be_refused():
        model = get_peft_model(base_of(task), config).eval()
    bend(model)
    found = model(input_ids=IDS, **labels)
    (found.loss if labels else found.last_hidden_state.square().mean()).backward()
    assert all(spline.weight.grad.abs().sum() > 0 for spline in splines(model))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(base_of(task), folder).eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS, **labels)[0], model(input_ids=IDS, **labels)[0])


for task in TASKS:
    operation("Task types", task.value)(lambda placement, task=task: check_task(task, placement))
