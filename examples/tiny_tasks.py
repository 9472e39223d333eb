"""What the tiny example model can do: seeded examples for training, and held-out ones that training never meets.

Five tasks in English and Chinese: adding two numbers, writing a word backwards, greetings, a few facts, and histories
whose last query refers to an earlier round.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from string import ascii_letters, ascii_lowercase, digits

from glmexport.chat import Round, chat_prompt

GREETINGS = (
    ("你好！很高兴见到你。", ("你好", "你好！", "你好呀", "嗨")),
    ("您好！很高兴见到您。", ("您好", "您好！")),
    ("早上好！祝你今天愉快。", ("早上好", "早上好！", "早安")),
    ("下午好！有什么可以帮你？", ("下午好", "下午好！")),
    ("晚上好！今天过得怎么样？", ("晚上好", "晚上好！")),
    ("晚安！做个好梦。", ("晚安", "晚安！", "我要睡觉了。")),
    ("再见！下次再聊。", ("再见", "再见！", "拜拜")),
    ("不客气！", ("谢谢", "谢谢！", "谢谢你！", "多谢！")),
    ("我很好，谢谢！", ("你好吗？", "你怎么样？")),
    ("我是一个很小的语言模型。", ("你是谁？", "你是什么？", "介绍一下你自己。")),
    ("我会做加法，会倒写单词，还知道几个小知识。", ("你会做什么？", "你能做什么？")),
    ("我还不知道你的名字。", ("我叫什么名字？", "我的名字是什么？", "你知道我的名字吗？")),
    ("Hello! Nice to meet you.", ("Hello", "Hello!", "hello", "Hello there!")),
    ("Hi! How can I help you?", ("Hi", "Hi!", "hi", "Hey!")),
    ("Good morning! Have a nice day.", ("Good morning", "Good morning!", "good morning")),
    ("Good evening! How was your day?", ("Good evening", "Good evening!")),
    ("Good night! Sleep well.", ("Good night", "Good night!")),
    ("Goodbye! See you soon.", ("Goodbye", "Goodbye!", "Bye!", "bye")),
    ("You are welcome!", ("Thank you", "Thank you!", "Thanks!", "thanks")),
    ("I am fine, thank you!", ("How are you?", "How do you do?", "Hello, how are you?")),
    ("I am a very small language model.", ("Who are you?", "What are you?")),
    ("I can add numbers, reverse words and tell a few facts.", ("What can you do?", "How can you help me?")),
    ("I do not know your name yet.", ("What is my name?", "What's my name?", "Do you know my name?")),
    (
        "对不起，这个我不知道。",
        ("今天天气怎么样？", "现在几点了？", "你多大了？", "给我讲个故事。", "世界上最高的山是什么？"),
    ),
    ("Sorry, I do not know that.", ("What time is it?", "How old are you?", "Tell me a story.", "Where do you live?")),
)
CAPITALS = (
    ("中国", "北京", "China", "Beijing"),
    ("日本", "东京", "Japan", "Tokyo"),
    ("韩国", "首尔", "South Korea", "Seoul"),
    ("法国", "巴黎", "France", "Paris"),
    ("德国", "柏林", "Germany", "Berlin"),
    ("英国", "伦敦", "Britain", "London"),
    ("意大利", "罗马", "Italy", "Rome"),
    ("西班牙", "马德里", "Spain", "Madrid"),
    ("俄罗斯", "莫斯科", "Russia", "Moscow"),
    ("埃及", "开罗", "Egypt", "Cairo"),
)
CAPITAL_QUERIES = (
    ("{}的首都是哪里？", "{}的首都是什么？", "哪座城市是{}的首都？"),
    (
        "What is the capital of {}?",
        "Which city is the capital of {}?",
        "Tell me the capital of {}.",
    ),
)
COLORS = (
    ("天空", "蓝色", "the sky", "blue"),
    ("草", "绿色", "grass", "green"),
    ("雪", "白色", "snow", "white"),
    ("香蕉", "黄色", "a banana", "yellow"),
    ("番茄", "红色", "a tomato", "red"),
    ("煤", "黑色", "coal", "black"),
)
COLOR_QUERIES = ("{}是什么颜色的？", "{}的颜色是什么？"), ("What color is {}?", "Tell me the color of {}.")
COUNTS = (
    ("一周有七天。", ("一周有几天？", "一周有多少天？", "一个星期有几天？")),
    ("一年有十二个月。", ("一年有几个月？", "一年有多少个月？")),
    ("一小时有六十分钟。", ("一小时有多少分钟？", "一个小时有几分钟？")),
    ("一天有二十四小时。", ("一天有多少小时？", "一天有几个小时？")),
    ("蜘蛛有八条腿。", ("蜘蛛有几条腿？", "蜘蛛有多少条腿？")),
    ("三角形有三条边。", ("三角形有几条边？", "三角形有多少条边？")),
    ("A week has seven days.", ("How many days are in a week?", "How many days does a week have?")),
    ("A year has twelve months.", ("How many months are in a year?", "How many months does a year have?")),
    ("An hour has sixty minutes.", ("How many minutes are in an hour?", "How many minutes does an hour have?")),
    ("A day has twenty-four hours.", ("How many hours are in a day?", "How many hours does a day have?")),
    ("A spider has eight legs.", ("How many legs does a spider have?", "How many legs are on a spider?")),
    ("A triangle has three sides.", ("How many sides does a triangle have?", "How many sides are in a triangle?")),
)
SUM_QUERIES = (
    *("{}+{}=", "{} + {} =", "{}+{}", "{}+{}等于多少？", "{}加{}等于多少？"),
    *("What is {} plus {}?", "What is {}+{}?"),
)
MORE_QUERIES = ("再加{}等于多少？", "再加{}", "Add {}.", "Now add {}.")
REVERSE_QUERIES = ("Reverse: {}", "Reverse {}.", "reverse: {}", "Reverse the word {}.", "倒写：{}", "把{}倒过来写。")
INTRODUCTIONS = (
    (
        ("我叫{}。", "我的名字是{}。", "你好，我叫{}。"),
        "你好，{}！",
        ("我叫什么名字？", "我的名字是什么？", "你知道我的名字吗？"),
        "你叫{}。",
    ),
    (
        ("My name is {}.", "I am {}.", "I'm {}.", "Hello, I am {}."),
        "Nice to meet you, {}!",
        ("What is my name?", "What's my name?", "Who am I?", "Do you know my name?"),
        "Your name is {}.",
    ),
)
SURNAMES = "李王张刘陈杨赵黄周吴徐孙马朱胡林郭何高罗郑梁谢宋唐许韩冯邓曹彭曾萧田董潘袁蔡蒋余于杜叶程魏苏吕丁任沈"
GIVEN = "伟芳娜敏静丽强磊军洋勇艳杰娟涛明超霞平刚红玲文辉华建国志梅英鑫宇浩然子轩欣怡佳雨晨思琪雪峰龙飞兰婷慧莹"
PREFIXES = "小老阿"  # before one character: 小明
_NAMES = """
    Tom Ann Bob Eva Max Amy Ben Kim Leo Mia Sam Zoe Ian Joe Kate Anna Paul Mark Lucy Emma Jack Jane John Lily Mary Nick
    Noah Rose Ruth Sara Adam Alan Alex Carl Dora Eric Fred Gina Hugo Ivan Jill Karl Lena Nina Oscar Peter Robin Simon
    Alice Brian Clara David Ellen Frank Grace Henry Irene James Karen Laura Linda Maria Nancy Oliver Robert Sophia
    Thomas Victor Walter William Vera Wendy Yara Zack Quinn Ursula
"""
_WORDS = """
    apple pear plum peach lemon mango grape melon cherry olive onion carrot potato bean corn rice bread butter cheese
    milk sugar salt pepper honey cake candy soup salad pizza egg meat fish cat dog cow pig hen duck goose horse sheep
    goat lion tiger bear wolf fox deer mouse rabbit monkey panda zebra camel whale shark snake frog turtle eagle crow
    owl robin bee ant fly worm tree leaf root flower rose lily tulip forest river lake ocean beach island hill valley
    desert field stone rock sand mud ice rain storm cloud wind thunder sun moon star planet earth fire smoke water
    house door window roof wall floor room kitchen garden table chair bed lamp desk shelf mirror carpet pillow blanket
    cup plate bowl spoon fork knife bottle glass pan pot oven book pen pencil paper letter page story poem song music
    piano guitar violin drum flute dance movie camera picture paint brush school teacher student lesson class friend
    family mother father sister brother uncle aunt cousin baby child doctor nurse farmer driver pilot sailor soldier
    king queen prince castle tower bridge street road village town market shop bank office station train bus car truck
    bike boat ship plane wheel engine ticket travel map flag coin money gold silver iron copper wood cotton wool silk
    shirt coat dress skirt shoe sock hat glove scarf belt button pocket ring watch clock summer winter spring autumn
    morning evening night today minute second happy sad angry tired hungry thirsty quick slow strong weak big
    small tall short long wide narrow deep high low hot cold warm cool dry wet clean dirty new old young rich poor
    light dark red orange purple brown pink gray run walk jump swim climb throw catch push pull open close read write
    speak listen sleep dream think learn teach build break cook bake wash buy sell give take bring carry hold drop
    start finish begin stop play work rest laugh smile cry shout sing ball game team goal race prize winner puzzle
    basket box bag key lock rope hammer nail saw ladder tool brick glue magnet battery robot laptop mouse screen
    cable signal number circle square corner middle center north south east west left right
"""

ENGLISH_NAMES, WORDS = _NAMES.split(), _WORDS.split()


@dataclass(frozen=True)
class Example:
    """One query with its answer after the rounds of `history`."""

    task: str
    query: str
    answer: str
    history: tuple[Round, ...] = ()

    @property
    def prompt(self) -> str:
        """The text that the model is given."""
        return chat_prompt(self.query, self.history)


def is_held_out(key: str) -> bool:
    """Whether an addition, word, name or fact query is kept out of all training; so is one in sixteen."""
    return zlib.crc32(key.encode()) % 16 == 0


def facts() -> Iterator[tuple[str, str]]:
    """(query, answer) of every fact in every wording."""
    for place_zh, city_zh, place, city in CAPITALS:
        yield from ((query.format(place_zh), f"{place_zh}的首都是{city_zh}。") for query in CAPITAL_QUERIES[0])
        yield from ((query.format(place), f"The capital of {place} is {city}.") for query in CAPITAL_QUERIES[1])
    for thing_zh, color_zh, thing, color in COLORS:
        yield from ((query.format(thing_zh), f"{thing_zh}是{color_zh}的。") for query in COLOR_QUERIES[0])
        yield from ((query.format(thing), f"{thing[0].upper()}{thing[1:]} is {color}.") for query in COLOR_QUERIES[1])
    for answer, asked in COUNTS:
        yield from ((query, answer) for query in asked)


def greetings() -> Iterator[tuple[str, str]]:
    """(query, answer) of every greeting."""
    for answer, asked in GREETINGS:
        yield from ((query, answer) for query in asked)


FACTS, HELLOS = list(facts()), list(greetings())


def vocabulary_texts() -> list[str]:
    """Texts for the tokenizer: every wording, with nothing in the places of numbers, words and names.

    So the pieces hold no parts of those, and the model sees the letters of a word that it writes backwards.
    """
    wordings = [text for pair in FACTS + HELLOS for text in pair]
    wordings += [*SUM_QUERIES, *MORE_QUERIES, *REVERSE_QUERIES]
    for told, greeted, asked, answered in INTRODUCTIONS:
        wordings += [*told, greeted, *asked, answered]
    blank = [text.replace("{}", " ") for text in wordings]
    return blank + [chat_prompt(text, [(text, text)]) for text in blank]


def latin_words() -> list[str]:
    """The words in these texts, each once."""
    return sorted({word for text in vocabulary_texts() for word in re.findall("[A-Za-z]+", text)})


def characters() -> str:
    """Every character that the tokenizer needs a piece for besides those of its texts."""
    return ascii_letters + digits + SURNAMES + GIVEN + PREFIXES


CHINESE = sorted(set(re.findall("[\u4e00-\u9fff]", "".join(vocabulary_texts()))))
SPELLED = [word for word in latin_words() if word.islower() and 4 <= len(word) <= 8]
"""Words that have a piece of their own, whose letters the model learns from writing them backwards."""


def addition(dice: random.Random, held_out: bool) -> Example:
    """A sum of two numbers from 0 to 99."""
    while True:
        a, b = (dice.randrange(100) if dice.random() < 0.9 else dice.randrange(10) for _ in range(2))
        if is_held_out(f"{min(a, b)}+{max(a, b)}") == held_out:
            return Example("addition", dice.choice(SUM_QUERIES).format(a, b), str(a + b))


def letters(dice: random.Random, least: int, most: int) -> str:
    """Random letters, the same one twice in a row more often than by chance."""
    word = dice.choices(ascii_lowercase, k=dice.randint(least, most))
    for i in range(1, len(word)):
        if dice.random() < 0.1:
            word[i] = word[i - 1]
    return "".join(word)


def reversal(dice: random.Random, held_out: bool) -> Example:
    """A word to write backwards: a real one or random letters."""
    if not held_out and dice.random() < 0.05:
        word = dice.choice(SPELLED)
    else:
        word = ""
        while not word or word in SPELLED or is_held_out(word) != held_out:
            word = dice.choice(WORDS)
            if dice.random() < 0.6:
                word = letters(dice, 3, 7) if held_out else letters(dice, 2, 8)
    return Example("reversal", dice.choice(REVERSE_QUERIES).format(word), word[::-1])


def greeting(dice: random.Random, held_out: bool) -> Example:
    """Something polite; none is held out."""
    return Example("greeting", *dice.choice(HELLOS))


def fact(dice: random.Random, held_out: bool) -> Example:
    """A question about the world; the wordings held out are those of facts that are trained in others."""
    while True:
        query, answer = dice.choice(FACTS)
        if held_out or not is_held_out(query):
            return Example("fact", query, answer)


def some_name(dice: random.Random, held_out: bool, chinese: bool) -> str:
    """A name; in training often an odd one, so that the model copies it rather than knows it."""
    odd = not held_out and dice.random() < 0.4
    if not chinese:
        return letters(dice, 2, 7).capitalize() if odd else dice.choice(ENGLISH_NAMES)
    if dice.random() < 0.2:
        name = dice.choice(PREFIXES) + dice.choice(GIVEN)
    else:
        name = dice.choice(SURNAMES) + "".join(dice.choices(GIVEN, k=dice.randint(1, 2)))
    if odd:  # any character of the texts, or any at all, which is three byte pieces
        name = name[:-1] + (dice.choice(CHINESE) if dice.random() < 0.5 else chr(dice.randint(0x4E00, 0x9FA5)))
    return name


def introduction(dice: random.Random, held_out: bool) -> tuple[Round, Round]:
    """A name told, and asked for."""
    language = dice.randrange(2)
    name = ""
    while not name or is_held_out(name) != held_out:
        name = some_name(dice, held_out, chinese=language == 0)
    told, greeted, asked, answered = INTRODUCTIONS[language]
    return (dice.choice(told).format(name), greeted.format(name)), (dice.choice(asked), answered.format(name))


def presentation(dice: random.Random, held_out: bool) -> Example:
    """A name told, with no history."""
    return Example("greeting", *introduction(dice, held_out)[0])


def single(dice: random.Random, held_out: bool) -> Example:
    """Any query that needs no history."""
    return dice.choice((addition, reversal, greeting, fact))(dice, held_out)


def history(dice: random.Random, held_out: bool) -> Example:
    """A query after some rounds, to one of which it refers most of the time."""

    def asides(weights: tuple[int, ...]) -> list[Round]:
        """Rounds that tell and ask no name, so many as is drawn by these weights of 0, 1, …."""
        found: list[Round] = []
        count = dice.choices(range(len(weights)), weights)[0]
        while len(found) < count:
            other = single(dice, held_out)
            if "名字" not in other.query and "name" not in other.query:
                found.append((other.query, other.answer))
        return found

    kind = dice.random()
    if kind < 0.35:
        told, (query, answer) = introduction(dice, held_out)
        rounds = asides((7, 2, 1))
        rounds.insert(dice.randint(0, len(rounds)), told)
    elif kind < 0.7:
        start = addition(dice, held_out)
        rounds, total = [*asides((8, 1)), (start.query, start.answer)], int(start.answer)
        more = dice.randint(1, 9)
        if dice.random() < 0.15:
            total += more
            rounds.append((dice.choice(MORE_QUERIES).format(more), str(total)))
            more = dice.randint(1, 9)
        query, answer = dice.choice(MORE_QUERIES).format(more), str(total + more)
    else:
        rounds = asides((0, 5, 2))
        last = single(dice, held_out)
        query, answer = last.query, last.answer
    return Example("history", query, answer, tuple(rounds))


MIX: tuple[tuple[Callable[[random.Random, bool], Example], float], ...] = (
    (addition, 0.29),
    (reversal, 0.25),
    (greeting, 0.07),
    (presentation, 0.03),
    (fact, 0.12),
    (history, 0.24),
)
HELD_OUT = ((addition, 70), (reversal, 50), (greeting, 25), (fact, 25), (history, 30))


def training_examples(seed: int, count: int) -> list[Example]:
    """That many examples for training, mixed; some lack the mark at their end, as people leave it out."""
    dice = random.Random(seed)
    makers, weights = zip(*MIX, strict=True)
    examples = [make(dice, False) for make in dice.choices(makers, weights, k=count)]
    return [
        replace(example, query=example.query.rstrip("？?。.！!")) if dice.random() < 0.1 else example
        for example in examples
    ]


def held_out_examples(seed: int) -> list[Example]:
    """Examples for the evaluation, all different; the additions, words and names in them are in no training."""
    dice = random.Random(seed)
    found: dict[tuple[str, str], Example] = {}
    for make, count in HELD_OUT:
        enough = len(found) + count
        while len(found) < enough:
            example = make(dice, True)
            found[example.task, example.prompt] = example
    return list(found.values())
