"""What a fine-tuning or generation step takes: model shapes, GPUs, ops, methods, timeline, allocator, roofline."""
