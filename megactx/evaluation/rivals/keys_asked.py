from megactx.data.user_turns import UserTurns
from megactx.focus.keys import questions_of

from .keys import Keys


class KeysAsked(Keys):
    """As ``keys``, but asked by what a session takes for the question, of the turn in which the text stands too."""

    def questions(self, asked):
        return questions_of([*asked.ids, *asked.end], UserTurns.of(self.tokenizer))[0]
