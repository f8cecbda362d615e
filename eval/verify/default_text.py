"""Default text of `verify`: plain English and Python, written for this project."""

DEFAULT_TEXT = '''\
The harbour office opened at six. By then the fishing boats had been out for two hours, and the only people on the
quay were the ice seller and a woman who painted numbers on crates. She worked from left to right, never looked up,
and made no mistakes. When the tide turned, the first boat came around the lighthouse, low in the water. "A good
night," said the ice seller. "Or a heavy net," said the woman. They had said the same words on many mornings, and
one of them was usually right.

In the valley behind the town the farmers were cutting hay. Rain had been forecast for the evening, so they began
with the steep field, where the machine could not go, and left the flat one for the afternoon. At noon they ate
bread, cheese and cold potatoes in the shade of the only tree. Nobody spoke much. A dog slept under the cart; two
children counted swallows and came to different results, which they discussed until it was time to go on.

Water boils at a lower temperature on a mountain than at the coast, because the air presses less on its surface. A
cook who does not know this waits for potatoes that never become soft. The remedy is a lid that holds the steam
back: the pressure in the pot rises, and with it the temperature. The same idea drove the first engines, which
lifted water out of mines and paid for themselves in coal.

def moving_average(values, width):
    """Mean of the last `width` values at every position."""
    if width < 1:
        raise ValueError(f"width must be positive, got {width}")
    total = 0.0
    result = []
    for index, value in enumerate(values):
        total += value
        if index >= width:
            total -= values[index - width]
        result.append(total / min(index + 1, width))
    return result


class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
        if not self.items:
            raise IndexError("pop from an empty stack")
        return self.items.pop()


print(moving_average([1, 2, 3, 4, 5], width=2))
'''
