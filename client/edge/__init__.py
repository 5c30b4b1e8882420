"""The agent on a device: verify, patch, activate, self-test, infer."""
