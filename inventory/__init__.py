"""The ledger, the audit log and the NHI inventory: everything the broker remembers."""
