"""Fine-tuning for real: the choice of a plan, run by Transformers' Trainer. docs/finetune.md tells of it."""
