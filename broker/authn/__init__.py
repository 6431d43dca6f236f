"""SVID in, `Caller` out: validation by the rules of docs/spiffe-rules.md. Reads no ledger."""
