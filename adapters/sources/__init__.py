"""Discovery: one read-only reader per kind of source; room kept, none shipped yet."""
