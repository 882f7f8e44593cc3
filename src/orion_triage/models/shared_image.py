"""A model with rows that share images: the vision tower runs once per image, not once per row.

Both records of a training target, and three of the four conditions, use the same image. At the 1.6B model's shapes,
the tower is half of a row's arithmetic (490 of 1,000 billion products). With `image_of_row`, the pixels have one row
per image instead of one per question. Without it, the model is transformers' own.

With `shared_tokens`, the language model also reads the image and the text before the first difference once per image,
or, where the text stands before the image, that text once for all rows.

Each family's `model_class` puts this before transformers' class, in which `model.language_model` and
`config.image_token_id` have the same names in every family.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers


class SharedImages:
    """Stands before transformers' class and adds a way to assign images to rows; `look` is the family's.

    The class of both keeps the published name: transformers chooses the loss by it, and saved configurations have it.
    """

    vision_keys: tuple[str, ...]  # the arguments of `look`
    config: Any
    model: Any
    training: bool
    get_input_embeddings: Any
    # (pixels by name) -> the features of each image for the language model: [images, image tokens, text width]
    look: Callable[..., torch.Tensor]

    def forward(  # generation inspects these parameter names
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_of_row: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        shared_tokens: int = 0,
        **others: Any,
    ) -> Any:
        """transformers' forward with three more arguments.

        `image_of_row` [rows] is the index of each row's image; `others` has the images, all of one size, under
        `vision_keys`. `image_features` [images, image tokens, text width] is the result of `look` and replaces them.
        `shared_tokens` is the number of first tokens that are the same in all rows (`encode.shared_tokens`): they run
        once per image if they contain it, else once for all rows, and the logits start after them. Under gradient
        checkpointing it is ignored: a layer that is computed again would write into the cache twice, so transformers
        gives it none. Padding has to be on the right, because no mask hides it.
        """
        if image_of_row is not None:
            assert input_ids is not None
            pixels = {key: others.pop(key) for key in self.vision_keys if key in others}
            seen = image_features if image_features is not None else self.look(**pixels)
            recomputed = self.training and self.model.language_model.layers[0].gradient_checkpointing
            if shared_tokens and not recomputed:
                past_key_values = self.read(input_ids[:, :shared_tokens], seen, image_of_row)
                inputs_embeds = self.embed(input_ids[:, shared_tokens:], seen, image_of_row)
            else:
                inputs_embeds = self.embed(input_ids, seen, image_of_row)
            input_ids = None
        return super().forward(  # type: ignore[misc]
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **others,
        )

    def read(self, input_ids: torch.Tensor, seen: torch.Tensor, image_of_row: torch.Tensor) -> transformers.Cache:
        """The cache after tokens [rows, tokens] that are the same in all rows, with gradients.

        They are read once per image, or once if they contain no image.
        """
        has_image = bool((input_ids[0] == self.config.image_token_id).any())
        each = torch.arange(len(seen) if has_image else 1, device=image_of_row.device)
        cache = transformers.DynamicCache(config=self.config.text_config)
        self.model.language_model(inputs_embeds=self.embed(input_ids[: len(each)], seen, each), past_key_values=cache)
        # Meant for beams: row i gets the states of its image, or those of the text.
        cache.reorder_cache(image_of_row if has_image else torch.zeros_like(image_of_row))
        return cache

    def embed(self, input_ids: torch.Tensor, seen: torch.Tensor, image_of_row: torch.Tensor) -> torch.Tensor:
        """Token embeddings [rows, tokens, text width], with `seen` in the places of the image tokens."""
        embeddings = self.get_input_embeddings()(input_ids)
        is_image = (input_ids == self.config.image_token_id).unsqueeze(-1)
        return embeddings.masked_scatter(is_image, seen[image_of_row].to(embeddings.dtype))
