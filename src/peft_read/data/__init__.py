"""Readers of published dataset formats, features, collators, and the generated How2-mini."""

from .clip_features import (
    ClipFeatures,
    PooledFeatures,
    TextFeatures,
    l2_normalize,
    query_similarity,
    temporal_endpoints,
)
from .collators import MomentDetrCollator, UMTCollator, annotated_pairs, ranked_pairs, window_pairs
from .features import FeatureStore, write_feature_archive
from .how2 import How2Collator, load_how2
from .how2_mini import HOW2_MINI_DOMAINS, How2MiniClip, generate_how2_mini, how2_mini_talk, write_how2_mini
from .multitask import MultitaskBatchSampler, MultitaskDataset
from .pseudo_queries import moments_of_similar_clips, pseudo_queries
from .qvhighlights import ground_truth_records, load_qvhighlights, low_resource_split
from .sentence_encoder import SentenceEncoder
from .tvsum import TVSUM_DOMAINS, leave_one_video_out, load_tvsum, pool_frames
from .youtube_highlights import YOUTUBE_DOMAINS, load_youtube_highlights

__all__ = [
    "HOW2_MINI_DOMAINS",
    "TVSUM_DOMAINS",
    "YOUTUBE_DOMAINS",
    "ClipFeatures",
    "FeatureStore",
    "How2Collator",
    "How2MiniClip",
    "MomentDetrCollator",
    "MultitaskBatchSampler",
    "MultitaskDataset",
    "PooledFeatures",
    "SentenceEncoder",
    "TextFeatures",
    "UMTCollator",
    "annotated_pairs",
    "generate_how2_mini",
    "ground_truth_records",
    "how2_mini_talk",
    "l2_normalize",
    "leave_one_video_out",
    "load_how2",
    "load_qvhighlights",
    "load_tvsum",
    "load_youtube_highlights",
    "low_resource_split",
    "moments_of_similar_clips",
    "pool_frames",
    "pseudo_queries",
    "query_similarity",
    "ranked_pairs",
    "temporal_endpoints",
    "window_pairs",
    "write_feature_archive",
    "write_how2_mini",
]
