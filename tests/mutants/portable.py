"""Planted defects of what differs between systems and devices."""

from tests.mutants.mutant import planted

MUTANTS = [
    *planted(
        "data/files.py",
        "program/test_portable.py",
        (
            "portable: Windows has no locks",
            "return msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)",
            "return None",
            "test_a_folder_has_one_process_on_windows_too",
        ),
        (
            "portable: who waits gives up as soon as Windows does",
            "if not wait or error.errno != errno.EDEADLK:",
            "if not wait or error.errno == errno.EDEADLK:",
            "test_a_folder_has_one_process_on_windows_too",
        ),
        (
            "portable: a folder that cannot be opened ends the checkpoint",
            "    except PermissionError:\n        return\n",
            "    except IsADirectoryError:\n        return\n",
            "test_a_folder_that_cannot_be_opened_is_not_flushed",
        ),
        (
            "portable: texts have other line ends on Windows",
            'with open(path, "w", encoding="utf-8", newline="\\n") as file:',
            'with open(path, "w", encoding="utf-8") as file:',
            "test_texts_are_the_same_bytes_on_every_system",
        ),
        (
            "portable: texts are in the system's encoding",
            'with open(path, "w", encoding="utf-8", newline="\\n") as file:',
            'with open(path, "w", newline="\\n") as file:',
            "test_no_file_of_the_package_depends_on_one_system[without_encoding]",
        ),
    ),
    *planted(
        "models/families/single_file.py",
        "program/test_portable.py",
        (
            "portable: a file of another suffix needs a link",
            "            shutil.copyfile(path, link)\n",
            "            raise\n",
            "test_a_file_of_another_suffix_is_copied_where_links_are_not_allowed",
        ),
    ),
    *planted(
        "reports/benchmark.py",
        "program/test_portable.py",
        (
            "portable: the end of a benchmark's time kills it on Windows",
            "signal.raise_signal, (signal.SIGTERM,)",
            "__import__('os').kill, (0, signal.SIGTERM)",
            "test_a_training_that_has_used_up_its_time_is_asked_to_save",
        ),
    ),
    *planted(
        "training/logging.py",
        "program/test_apple.py",
        (
            "apple: the log's means are float64 on the device",
            "working(v).reshape(-1)",
            "v.to(torch.float64).reshape(-1)",
            "test_the_means_of_a_log_need_no_float64_on_the_device",
        ),
    ),
    *planted(
        "training/players.py",
        "program/test_apple.py",
        (
            "apple: the first bad step is float64 on the device",
            'float("inf"), dtype=torch.float32, device=device)',
            'float("inf"), dtype=torch.float64, device=device)',
            "test_every_method_takes_its_step",
        ),
    ),
    *planted(
        "planning/doctor.py",
        "program/test_apple.py",
        (
            "apple: the doctor compares in float64 on the device",
            "computed[name].cpu().double()",
            "computed[name].double().cpu()",
            "test_the_numbers_of_the_doctor_agree",
        ),
    ),
    *planted(
        "diffusion/schedule.py",
        "program/test_apple.py",
        (
            "apple: coefficients are moved before they are rounded",
            "return tensor.to(device=like.device, dtype=like.dtype, non_blocking=True)",
            "return tensor.to(device=like.device).to(like.dtype)",
            "test_images_of_scenes_64_are_those_of_the_cpu",
        ),
    ),
    *planted(
        "models/denoiser.py",
        "program/test_apple.py",
        (
            "apple: times are moved before they are rounded",
            "return times.to(device=x.device, dtype=dtype, non_blocking=True).expand(x.shape[0])",
            "return times.to(device=x.device).to(dtype).expand(x.shape[0])",
            "test_images_of_scenes_64_are_those_of_the_cpu",
        ),
    ),
    *planted(
        "models/lora.py",
        "models/test_roles.py",
        (
            "roles: an adapter that is added freezes the others under an older peft",
            "    for parameter in trained:  # peft below 0.21 freezes the adapters that were there\n"
            "        parameter.requires_grad_(True)\n",
            "",
            "test_an_adapter_that_is_added_freezes_none_that_learns",
        ),
    ),
]
