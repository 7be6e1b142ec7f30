"""Planted defects of data: pictures, folders, shards, tables, prompts, buckets, caches."""

from tests.mutants.mutant import planted

_PICTURES = planted(
    "data/pictures.py",
    "data/test_pictures.py",
    (
        "pictures: they lie on their side",
        "_rgb(ImageOps.exif_transpose(file))",
        "_rgb(file)",
        "test_pictures_are_upright_cut_around_their_middle_and_of_the_wanted_size",
    ),
    (
        "pictures: the shape that decides is the one before turning",
        "sides = (file.width, file.height) if turned else (file.height, file.width)",
        "sides = (file.height, file.width)",
        "test_the_shape_that_decides_is_that_of_the_upright_picture",
    ),
    (
        "pictures: they are stretched",
        "Image.Resampling.LANCZOS, box=shown, reducing_gap=3.0)",
        "Image.Resampling.LANCZOS)",
        "test_pictures_are_upright_cut_around_their_middle_and_of_the_wanted_size",
    ),
    (
        "pictures: 16 bits are cut off at 255",
        'if image.mode.startswith("I"):',
        'if image.mode.startswith("X"):',
        "test_grey_of_16_bits_keeps_its_steps",
    ),
    (
        "pictures: what is transparent shows what lies under it",
        "if image.has_transparency_data:",
        "if False:",
        "test_what_is_transparent_is_white",
    ),
    (
        "pictures: any number of pixels is decoded",
        "if file.width * file.height > _MOST_PIXELS:",
        "if file.width > _MOST_PIXELS:",
        "test_large_pictures_are_read_and_larger_ones_refused",
    ),
    (
        "pictures: one pixel is a picture",
        "if min(sides) * _LEAST_PART < min(wanted):",
        "if min(sides) < 1:",
        "test_what_cannot_be_used_is_said_in_a_few_words",
    ),
    (
        "pictures: any format that Pillow knows is opened",
        "Image.open(io.BytesIO(data), formats=_FORMATS)",
        "Image.open(io.BytesIO(data))",
        "test_what_cannot_be_used_is_said_in_a_few_words",
    ),
    (
        "pictures: links lead out of the folder",
        "there = path.resolve().is_relative_to(folder.resolve())",
        "there = path.absolute().is_relative_to(folder.absolute())",
        "tests/data/test_folder.py::test_links_that_lead_outside_are_not_followed",
    ),
    (
        "pictures: an empty caption is one",
        "    if not said:\n        raise",
        "    if said is None:\n        raise",
        "tests/data/test_folder.py::test_what_has_no_usable_caption_is_passed_over_and_listed",
    ),
    (
        "pictures: a changed caption has the old fingerprint",
        "repr((picture.name, picture.stamp, picture.caption))",
        "repr((picture.name, picture.stamp))",
        "tests/data/test_folder.py::test_a_fingerprint_knows_names_times_and_captions",
    ),
    (
        "pictures: a changed picture has the old fingerprint",
        "repr((picture.name, picture.stamp, picture.caption))",
        "repr((picture.name, picture.caption))",
        "tests/data/test_cache.py::test_a_changed_caption_picture_or_size_is_encoded_again",
    ),
)

_SHARDS = planted(
    "data/shards.py",
    "data/test_shards.py",
    (
        "shards: links are members like others",
        "if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):",
        "if member.ischr():",
        "test_a_hostile_tar_gives_its_good_samples_and_reasons",
    ),
    (
        "shards: absolute names pass",
        'if path.is_absolute() or ".." in path.parts:',
        'if ".." in path.parts:',
        "test_a_hostile_tar_gives_its_good_samples_and_reasons",
    ),
    (
        "shards: a member that is cut short passes",
        'return "it is cut short" if member.offset_data + member.size > size else ""',
        'return ""',
        "test_of_a_tar_cut_short_what_is_whole_is_kept",
    ),
    (
        "shards: the end is not looked at",
        "if any(file.read()):",
        "if not file:",
        "test_a_tar_cut_between_members_is_noticed",
    ),
    (
        "shards: samples of different folders are one",
        'f"{member.name.rpartition(\'/\')[0]}/{key}"',
        'f"{key}"',
        "test_captions_are_text_or_a_key_of_json",
    ),
)

_TABLES = planted(
    "data/tables.py",
    "data/test_tables.py",
    (
        "tables: a path in a cell is followed anywhere",
        "return inside(folders[-1], path).read_bytes()",
        "return (folders[-1] / path).read_bytes()",
        "test_a_hostile_table_gives_its_good_rows_and_reasons",
    ),
    (
        "tables: rows are counted anew in each group",
        "            first += len(texts)\n",
        "",
        "test_rows_are_pictures_in_their_order_over_groups_and_files",
    ),
    (
        "tables: every group is the first",
        "return file.read_row_group(group, columns=[column]).column(0)",
        "return file.read_row_group(0, columns=[column]).column(0)",
        "test_rows_are_pictures_in_their_order_over_groups_and_files",
    ),
    (
        "tables: a saved data set names files anywhere",
        '        inside(folder, str(file["filename"]))\n',
        "        pass\n",
        "test_a_saved_data_set_that_leads_elsewhere_is_refused",
    ),
)

_ORDER = planted(
    "data/sources.py",
    "data/test_buckets.py",
    (
        "buckets: rounds are not shuffled",
        "for b in generator.permutation(buckets)]",
        "for b in (buckets if generator else ())]",
        "test_the_order_follows_from_the_step_alone",
    ),
    (
        "buckets: small ones get more than their share",
        "return turn * source.order.size // batch_size",
        "return turn * -(-source.order.size // batch_size)",
        "test_all_pictures_are_visited_equally_often[4]",
    ),
    (
        "buckets: pictures are picked by the step, not by the visit",
        "return source.of_rows(rng, source.order.rows(rng, number))",
        "return source.of_rows(rng, source.order.rows(rng))",
        "test_all_pictures_are_visited_equally_often[4]",
    ),
    (
        "captions: the same rows are dropped in every batch",
        'dropped = rng.sample.uniform("caption_dropout") < self.share',
        'dropped = Rng(0, 0, rng.batch_size, rng.rows).sample.uniform("caption_dropout") < self.share',
        "test_captions_are_dropped_at_their_share_and_by_a_draw",
    ),
    (
        "captions: those are kept that should be dropped",
        "cond=batch.cond.drop(dropped)",
        "cond=batch.cond.drop(~dropped)",
        "test_captions_are_dropped_at_their_share_and_by_a_draw",
    ),
    (
        "prompts: zeros pass for pictures",
        "torch.full((), torch.nan,",
        "torch.full((), 0.0,",
        "test_prompts_give_conditions_and_nothing_that_could_pass_for_a_picture",
    ),
)

_SIZES = planted(
    "data/buckets.py",
    "data/test_buckets.py",
    (
        "buckets: height and width change places",
        "math.log(size[0] * width / (size[1] * height))",
        "math.log(size[1] * width / (size[0] * height))",
        "test_a_picture_goes_where_it_loses_least",
    ),
    (
        "buckets: they are larger than the square",
        "other = side * side // one // step * step",
        "other = -(-side * side // one // step) * step",
        "test_sizes_keep_to_the_area_and_the_multiple",
    ),
)

_CACHE = planted(
    "data/cache.py",
    "data/test_cache.py",
    (
        "cache: files of other data pass",
        "if said != self._about(rows):",
        "if said.keys() != self._about(rows).keys():",
        "test_a_changed_caption_picture_or_size_is_encoded_again",
    ),
    (
        "cache: what was skipped is forgotten when it is found again",
        "return parts, without\n        except",
        "return parts, []\n        except",
        "test_what_cannot_be_read_is_passed_over_and_listed",
    ),
    (
        "cache: a group's captions are those of the first rows",
        "[caption for _, caption in group]",
        "sorted(caption for _, caption in group)",
        "test_latents_are_the_teachers_of_these_pictures",
    ),
    (
        "cache: buckets are cut to squares",
        "if buckets else ((side, side),)",
        "if not buckets else ((side, side),)",
        "test_pixels_of_a_bucket_are_the_pictures_own",
    ),
)

_LET_GO = planted(
    "models/families/teacher.py",
    "data/test_cache.py",
    (
        "teacher: of several text encoders one is let go",
        'if name.startswith("text_encoder")]',
        'if name == "text_encoder"]',
        "test_text_encoders_are_let_go_and_what_was_asked_for_is_kept[sdxl]",
    ),
    (
        "teacher: what will be asked later is forgotten",
        "self._known[tuple(prompts)] = self.encode_prompts(prompts)",
        "self.encode_prompts(prompts)",
        "test_text_encoders_are_let_go_and_what_was_asked_for_is_kept[sdxl]",
    ),
)

PICTURES = [*_PICTURES, *_SHARDS, *_TABLES, *_ORDER, *_SIZES, *_CACHE, *_LET_GO]
