"""BLEU and other metrics, significance, reports."""
