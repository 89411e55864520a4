"""Data: real text, chat template, tokenizer, tasks, filters, mixtures, packing into batches."""
