"""Text, chat template, tokenizer, packing into batches, tool schemas, near copies."""
