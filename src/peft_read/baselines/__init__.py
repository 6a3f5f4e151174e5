"""The fine-tuning baselines of the paper."""
