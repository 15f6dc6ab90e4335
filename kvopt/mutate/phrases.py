"""The table behind the synonyms operator: phrases of instructions that can stand for each other, in whatever sentence
they are found.

A phrase belongs in :data:`GROUPS` only when every member fits wherever another one stands, in grammar and in meaning;
those that need a certain
neighbour stand in :data:`CONTEXTUAL`, where the named part ``x`` of the pattern is exchanged.
"""

from __future__ import annotations

import re

GROUPS: tuple[tuple[str, ...], ...] = (
    ("make sure to", "be sure to", "take care to", "remember to"),
    ("make sure that", "ensure that", "see to it that"),
    ("in order to", "so as to"),
    ("for example", "for instance"),
    ("do your best to", "try your best to"),
    ("respond with", "reply with", "answer with"),
    ("respond only with", "reply only with", "answer only with"),
    ("respond in", "reply in", "answer in"),
    ("your answer", "your response", "your reply"),
    ("your answers", "your responses", "your replies"),
    ("choose", "select", "pick"),
    ("disregard", "ignore"),
    ("begin with", "start with"),
    ("begins with", "starts with"),
    ("ends with", "finishes with"),
    ("end with", "finish with"),
    ("generate", "produce"),
    ("adhere to", "stick to", "keep to"),
    ("concentrate on", "focus on"),
    ("at most", "no more than", "not more than"),
    ("at least", "no fewer than", "not fewer than"),
    ("exactly one", "precisely one"),
    ("fewer than", "less than"),
    ("if possible", "where possible", "when possible"),
    ("if necessary", "if needed", "when necessary", "where needed"),
    ("as needed", "as required", "as necessary"),
    ("you are given", "you will be given", "you receive", "you will receive", "you get", "you will get"),
    ("and nothing else", "and nothing more"),
    ("in the form of", "in the shape of"),
    ("on a single line", "on one line"),
    ("in a single line", "in one line"),
    ("as a single line", "as one line"),
    ("in a single sentence", "in one sentence"),
    ("one of the following", "one of these"),
    ("according to", "in accordance with", "in line with"),
    ("based on", "on the basis of"),
    ("with respect to", "with regard to", "in respect of"),
    ("as follows", "like this"),
    ("word for word", "verbatim"),
    ("exactly as", "just as", "precisely as"),
    ("step by step", "one step at a time"),
    ("attempt to", "try to"),
    ("you may not", "you are not allowed to"),
    ("please note that", "note that", "keep in mind that", "bear in mind that", "remember that"),
    ("it is important to", "it is essential to", "it is crucial to", "it is vital to"),
    ("it is important that", "it is essential that", "it is crucial that", "it is vital that"),
    ("in addition,", "additionally,", "furthermore,", "moreover,"),
    ("therefore", "thus", "hence"),
    ("all of the", "all the"),
    ("both of the", "both the"),
    ("at the beginning of", "at the start of"),
    ("whenever", "every time"),
    ("provided that", "as long as"),
    ("only if", "only when"),
    ("except for", "apart from"),
    ("in this case", "in that case"),
    ("in other words", "put differently"),
    ("in general,", "generally,", "as a rule,"),
    ("one by one", "one at a time"),
    ("right before", "immediately before", "directly before"),
    ("right after", "immediately after", "directly after"),
    ("regardless of", "irrespective of", "no matter"),
    ("in the same order", "in the same sequence"),
    ("with a capital letter", "with an uppercase letter"),
    ("in lowercase", "in lower case", "in lowercase letters"),
    ("in uppercase", "in upper case", "in uppercase letters"),
    ("in plain english", "in simple english"),
    ("full sentences", "complete sentences"),
    ("full sentence", "complete sentence"),
    ("any extra", "any additional", "any further"),
    ("no extra", "no additional", "no further"),
    ("extra text", "additional text", "further text"),
    ("extra words", "additional words", "further words"),
    ("quotation marks", "quote marks"),
    ("blank line", "empty line"),
    ("blank lines", "empty lines"),
    ("an appropriate", "a suitable", "a fitting"),
    ("the appropriate", "the suitable"),
    ("the entire", "the whole"),
    ("an entire", "a whole"),
    ("frequently", "often"),
    ("usually", "normally", "typically"),
    ("take into account", "take account of"),
    ("the rest of", "the remainder of"),
    ("no longer than", "not longer than"),
    ("to this end", "for this purpose"),
    ("without exception", "with no exceptions"),
    ("under no circumstances", "in no case"),
    ("are unsure", "are not sure", "are uncertain"),
    ("is unsure", "is not sure", "is uncertain"),
    ("is unclear", "is not clear"),
    ("are unclear", "are not clear"),
    ("keep it short", "keep it brief"),
    ("double-check", "check again"),
    ("clear and concise", "concise and clear"),
    ("short and clear", "clear and short"),
    ("in the same way", "in the same manner"),
    ("in a way that", "in such a way that"),
    ("do so", "do this"),
    ("taken from", "drawn from"),
    ("is missing", "is absent"),
    ("are missing", "are absent"),
    ("is required", "is needed"),
    ("are required", "are needed"),
    ("consists of", "is made up of"),
    ("consist of", "are made up of"),
    ("is called", "is named"),
    ("are called", "are named"),
    ("a couple of", "a few"),
    ("a variety of", "a range of"),
    ("a number of", "several"),
    ("this means that", "that means that"),
    ("not only", "not just"),
    ("be as brief as possible", "be as short as possible"),
    ("as closely as possible", "as faithfully as possible"),
    ("the most important", "the main"),
    ("without changing", "without altering", "without modifying"),
    ("does not mention", "does not name", "makes no mention of"),
    ("the user wants", "the user would like"),
    ("what the user wants", "what the user is after"),
    ("what the user asks for", "what the user requests"),
)  # fmt: skip

_START = r"(?:^|[.!?:;]\s+|[-*•] |^\(?\d+[.)] )"
_DETERMINED = r"(?= (?:a|an|the|all|any|every|each|one|only|your|this|these|exactly)\b)"
_NOT_MORE = r"(?! (?:not|never|always|also|be given)\b)"
_SINGULAR = (
    "answer|output|response|reply|result|text|value|object|line|sentence|summary|label|docstring|translation|query"
)
_PLURAL = "answers|values|labels|keys|lines|sentences|words|names|outputs"
_SHORT_THINGS = "summary|answer|response|reply|description|explanation|sentence|statement|title|line|docstring|phrase"
_SHOWN = "text|sentence|request|question|message|passage|function|code|review|document|article|paragraph|input|source|query|utterance|words"  # noqa: E501

CONTEXTUAL: tuple[tuple[re.Pattern[str], tuple[str, ...]], ...] = tuple(
    (re.compile(pattern, re.M), tuple(options.split("|")))
    for pattern, options in [
        (rf"\b(?P<x>[Yy]ou (?:must|have to|need to|are required to)){_NOT_MORE}", "you must|you have to|you need to|you are required to"),  # noqa: E501
        (r"\b(?P<x>[Ee]ach|[Ee]very)(?= (?!of\b|other\b|one\b|time\b|day\b|thing\b|and\b|is\b|has\b)[a-z]+\b)", "each|every"),  # noqa: E501
        (r"(?P<x>\b[Ww]ithout any|\b[Ww]ith no)(?= (?!\w+ing\b|more\b|longer\b|fewer\b)[a-z]+)", "without any|with no"),
        (rf"(?:{_START}|, )(?P<x>[Ii]f|[Ww]hen)(?= (?:the|a|an|no|you|there|any|several|some|nothing)\b)", "if|when"),
        (r"(?<=[a-z] )(?P<x>because|since)(?= (?:the|a|an|it|they|you|this)\b)", "because|as"),
        (rf"\b(?:{_SINGULAR}) (?P<x>must|has to|needs to){_NOT_MORE}(?= [a-z])", "must|has to|needs to"),
        (rf"\b(?:{_PLURAL}) (?P<x>must|have to|need to){_NOT_MORE}(?= [a-z])", "must|have to|need to"),
        (rf"\ba (?P<x>short|brief|concise)(?= (?:{_SHORT_THINGS})\b)", "short|brief|concise"),
        (r"(?<=[a-z] )(?P<x>carefully|with care|attentively)(?=[.,;]|$)", "carefully|with care|attentively"),
        (rf"\b(?P<x>the (?:given|provided|supplied))(?= (?:{_SHOWN})\b)", "the given|the provided|the supplied"),
        (r"(?P<x>\b[Ii]nstead of)(?= \w)", "rather than"),
        (r"(?P<x>\b[Ii]nvent|\b[Mm]ake up)(?= (?!it\b|them\b|to\b)[a-z])", "invent|make up"),
        (rf"{_START}(?P<x>Write|Compose){_DETERMINED}", "write|compose"),
        (rf"{_START}(?P<x>Use|Employ){_DETERMINED}", "use|employ"),
        (rf"{_START}(?P<x>Summarize|Sum up){_DETERMINED}", "summarize|sum up"),
        (rf"{_START}(?P<x>Determine|Work out|Figure out){_DETERMINED}", "determine|work out|figure out"),
        (rf"{_START}(?P<x>Return|Output|Give|Produce|Provide){_DETERMINED}", "return|output|give|produce|provide"),
        (rf"{_START}(?P<x>Find|Identify|Locate){_DETERMINED}", "find|identify|locate"),
        (rf"{_START}(?P<x>Extract|Pick out){_DETERMINED}", "extract|pick out"),
        (rf"{_START}(?P<x>Copy|Reproduce){_DETERMINED}", "copy|reproduce"),
        (rf"{_START}(?P<x>Follow|Observe|Stick to|Keep to)(?= (?:these|the|all|every) )", "follow|observe|stick to|keep to"),  # noqa: E501
        (rf"{_START}(?P<x>Check|Verify|Make sure|Ensure)(?= that )", "check|verify|make sure|ensure"),
        (rf"{_START}(?P<x>Describe|State|Say)(?= what )", "describe|state|say"),
        (rf"{_START}(?P<x>Read|Study|Look at){_DETERMINED}", "read|study|look at"),
        (rf"{_START}(?P<x>Classify|Categorize){_DETERMINED}", "classify|categorize"),
        (rf"{_START}(?P<x>Translate|Render)(?= the [a-z]+ (?:in)?to )", "translate|render"),
        (r"(?P<x>\b(?:[Oo]mit|[Ll]eave out))(?= (?:the|any|all|every|each|slots|keys|a|an|fields|words)\b)", "omit|leave out"),  # noqa: E501
        (r"\b(?i:return|output|give|write|print|provide|produce) (?P<x>only|just|nothing but)(?= (?:the|a|an|one|valid|your)\b)", "only|just|nothing but"),  # noqa: E501
        (r"(?P<x>\b(?:[Tt]hese|[Tt]he following))(?= (?:rules|guidelines|instructions|requirements|conventions|steps|constraints):)", "these|the following"),  # noqa: E501
        (r"\b(?P<x>can|may)(?= be (?:used|found|left|given|empty|omitted)\b)", "can|may"),
        (r"(?P<x>\band do not|\band never)(?= [a-z]+ )", "and do not|and never"),
        (r"\b(?P<x>that|which)(?= (?:is|are|was|were) (?:given|provided|shown|listed)\b)", "that|which"),
    ]
)  # fmt: skip
