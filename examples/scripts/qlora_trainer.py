"""QLoRA with the Hugging Face Trainer and a paged 8-bit AdamW, on any causal model: a Hub name or a folder.

usage: python qlora_trainer.py MODEL [--batch-size 1] [--seq-len 1024] [--steps 3]
"""

import argparse
import tempfile

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("--batch-size", type=int, default=1)
parser.add_argument("--seq-len", type=int, default=1024)
parser.add_argument("--steps", type=int, default=3)
args = parser.parse_args()


class RandomTokens(torch.utils.data.Dataset):
    def __init__(self, vocabulary: int) -> None:
        self.tokens = torch.randint(vocabulary, (args.steps * args.batch_size, args.seq_len))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


four_bit = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
model = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=four_bit, device_map={"": 0})
model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=args.batch_size,
        max_steps=args.steps,
        bf16=True,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        optim="paged_adamw_8bit",
        learning_rate=1e-4,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
    )
    Trainer(model=model, args=arguments, train_dataset=RandomTokens(model.config.vocab_size)).train()
