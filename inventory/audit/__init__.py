"""Canonical bytes, hash chain, signed heads and their offline verification."""
