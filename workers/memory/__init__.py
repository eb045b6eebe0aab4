"""Memory of the device and the host: KV pages, copies, free memory."""
