"""From text to batches.

    schemas     what rows mean: texts or conversations
    blocks      files of text, jsonl and parquet in pieces that workers parse
    corpus      local files as documents, and which of them are held out
    sources     data sets of the Hugging Face hub by name, or local files
    tokenise    blocks to tokens, by several processes, in order
    writer      tokens to shards on the disk
    folder      whose a folder is, and how it gets its name
    prepare     all of that: a source to a folder of shards, exact to continue after a kill
    verify      whether files are still what was written
    shards      a folder's tokens, memory-mapped
    run_data    the tokens of a run: raw text, prepared data or a mixture
    order, packing, mixture, batches, loader    tokens to batches
    conversations    rows of conversations or preferences to examples, with what carries loss
    chat_report      one of them in colour, and what they are in numbers
    examples, example_rows, tune_batches    examples to batches of fine-tuning
    baselines   what a model has to beat

Imports numpy only; pyarrow, datasets and grain are imported where they are needed.
"""
