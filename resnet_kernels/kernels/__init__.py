"""Device code, one file a kernel. Imported only when a Triton backend is asked for: Triton may be absent."""
