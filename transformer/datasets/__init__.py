"""Data sets: from files and TFDS to splits of sentence pairs."""
