"""Client for nhi-broker: open a task, get a credential, and it is revoked when the task ends."""
