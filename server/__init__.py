"""The multilora server: many LoRA adapters of different tasks on one frozen base model, in one batch."""

__version__ = "0.1.0"
