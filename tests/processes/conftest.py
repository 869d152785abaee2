"""pytest collects the tests only: these are programs that they run, and that import each other by their own names."""

collect_ignore = [
    "failing_ranks.py",
    "forked_meanwhile.py",
    "forked_trainer.py",
    "odd_surroundings.py",
    "sharded_trainer.py",
    "spawned_workers.py",
]
