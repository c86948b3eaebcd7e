"""The tasks that models are judged on: their data, their metrics and their fine-tuning."""
