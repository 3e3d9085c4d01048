"""From a compiled program to ACL graphs: capture per shape, replay, and the ledger of both."""
