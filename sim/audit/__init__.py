"""The audit: which token every slot holds, and whether the block tables say the same."""
