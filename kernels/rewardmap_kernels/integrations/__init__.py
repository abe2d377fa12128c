"""One line each for trainers that are not ours: ``integrations.trl.fuse_grpo`` and
``integrations.verl.register``."""
