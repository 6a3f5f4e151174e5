"""Readers of published dataset formats, features, collators, and the generated How2-mini."""

from .clip_features import (
    ClipFeatures,
    PooledFeatures,
    TextFeatures,
    l2_normalize,
    query_similarity,
    temporal_endpoints,
)
from .coco_people import load_coco_people
from .collators import MomentDetrCollator, UMTCollator, annotated_pairs, ranked_pairs, window_pairs
from .features import FeatureStore, write_feature_archive
from .how2 import How2Collator, load_how2
from .how2_mini import HOW2_MINI_DOMAINS, How2MiniClip, generate_how2_mini, how2_mini_talk, write_how2_mini
from .kilogram import load_kilogram_captions, load_kilogram_parts
from .multitask import MultitaskBatchSampler, MultitaskDataset
from .nlvr import load_nlvr
from .pseudo_queries import moments_of_similar_clips, pseudo_queries
from .qvhighlights import ground_truth_records, load_qvhighlights, low_resource_split
from .scene_tokens import SCENE_FEATURE_DIM, SceneTokens, people_tokens, piece_tokens, shape_tokens
from .sentence_encoder import SentenceEncoder
from .tvsum import TVSUM_DOMAINS, leave_one_video_out, load_tvsum, pool_frames
from .vl_collator import VIDEO_TASKS, VLCollator, resize_frames
from .vl_examples import TASK_PROMPTS
from .vl_images import load_coco_captions, load_gqa, load_nlvr2, load_vqa
from .vl_mini import VL_MINI_TASKS, VL_MINI_TOPICS, VLMiniExample, generate_vl_mini
from .vl_submissions import write_predictions
from .vl_videos import load_how2qa, load_tvc, load_tvqa, load_yc2c, read_subtitles
from .youtube_highlights import YOUTUBE_DOMAINS, load_youtube_highlights

__all__ = [
    "HOW2_MINI_DOMAINS",
    "SCENE_FEATURE_DIM",
    "TASK_PROMPTS",
    "TVSUM_DOMAINS",
    "VIDEO_TASKS",
    "VL_MINI_TASKS",
    "VL_MINI_TOPICS",
    "YOUTUBE_DOMAINS",
    "ClipFeatures",
    "FeatureStore",
    "How2Collator",
    "How2MiniClip",
    "MomentDetrCollator",
    "MultitaskBatchSampler",
    "MultitaskDataset",
    "PooledFeatures",
    "SceneTokens",
    "SentenceEncoder",
    "TextFeatures",
    "UMTCollator",
    "VLCollator",
    "VLMiniExample",
    "annotated_pairs",
    "generate_how2_mini",
    "generate_vl_mini",
    "ground_truth_records",
    "how2_mini_talk",
    "l2_normalize",
    "leave_one_video_out",
    "load_coco_captions",
    "load_coco_people",
    "load_gqa",
    "load_how2",
    "load_how2qa",
    "load_kilogram_captions",
    "load_kilogram_parts",
    "load_nlvr",
    "load_nlvr2",
    "load_qvhighlights",
    "load_tvc",
    "load_tvqa",
    "load_tvsum",
    "load_vqa",
    "load_yc2c",
    "load_youtube_highlights",
    "low_resource_split",
    "moments_of_similar_clips",
    "people_tokens",
    "piece_tokens",
    "pool_frames",
    "pseudo_queries",
    "query_similarity",
    "ranked_pairs",
    "read_subtitles",
    "resize_frames",
    "shape_tokens",
    "temporal_endpoints",
    "window_pairs",
    "write_feature_archive",
    "write_how2_mini",
    "write_predictions",
]
