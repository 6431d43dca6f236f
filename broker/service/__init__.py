"""What the broker does, one screen each: no HTTP, no vendor SDK, no SQL."""
