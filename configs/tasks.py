"""Tasks of text to text other than translation, on small generated data: summarization, sentiment, question answering.

    python -m benchmarks.task_data
    python train.py --config=configs/tasks.py:sentiment --workdir=runs/sentiment
    python eval.py --workdir=runs/sentiment --checkpoint=best --versus=runs/tasks/sentiment/baseline.txt

Summarization needs `pip install rouge-score`.

Test scores (trivial baseline): sentiment accuracy 100.0 (51.1), question answering exact match 67.4 (3.5),
summarization ROUGE-1 95.1 (12.3). About three minutes each on 2 shared cores of an Intel Xeon, float32 (2026-11-29,
commit 89c37d2 with this file). docs/tasks.md describes the tasks.
"""

from ml_collections import config_dict

from transformer.config import default_config

# Task: extensions of its files, source and target; metrics; target tokens of a batch.
TASKS = {
    "summarization": ("article", "summary", "rouge1,rouge2,rougeL", 512),
    "sentiment": ("review", "label", "accuracy", 128),
    "question_answering": ("question", "answer", "exact_match", 256),
}


def get_config(task: str = "summarization") -> config_dict.ConfigDict:
    """2+2 layers of width 128."""
    if task not in TASKS:
        raise ValueError(f"expected one of {', '.join(TASKS)}, got {task!r}")
    source, target, metrics, batch_tokens = TASKS[task]
    config = default_config()
    config.model.num_layers = 2
    config.model.emb_dim = 128
    config.model.mlp_dim = 512
    config.model.num_heads = 4
    config.model.norm = "pre"
    config.model.dropout_rate = 0.0

    config.data.name = "text"
    config.data.dir = f"runs/tasks/{task}"
    config.data.source_language = source
    config.data.target_language = target
    config.data.vocab_size = 1000
    config.data.max_length = 128
    config.data.num_buckets = 2

    config.optimizer.schedule = "cosine"
    config.optimizer.learning_rate = 1.5e-3
    config.optimizer.warmup_steps = 200

    config.train.num_steps = 1000
    config.train.batch_tokens = batch_tokens
    config.train.eval_every_steps = 500
    config.train.checkpoint_every_steps = 500

    config.eval.metrics = metrics
    return config
