"""What can be trained, one file each; every task is a `sfumato.training.loop.Task`."""
