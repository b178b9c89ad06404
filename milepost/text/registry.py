"""The tokenizers by name. To add one, write its class in a file of its own and add a line here.

The class is named as `module:Class` and imported only when it is used, so that reading the settings, whose choices of
TOKENIZER are these names, imports neither numpy nor a tokenizer library. milepost.text.tokenization.base says what the class
must have.
"""

TOKENIZERS: dict[str, str] = {
    "char": "milepost.text.tokenization.char:CharTokenizer",
    "byte": "milepost.text.tokenization.byte:ByteTokenizer",
    "bpe": "milepost.text.tokenization.bpe:BpeTokenizer",
    "gpt2": "milepost.text.tokenization.gpt2:Gpt2Tokenizer",
    "sentencepiece": "milepost.text.tokenization.sentencepiece:SentencePieceTokenizer",
}
