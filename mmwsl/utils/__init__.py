from mmwsl.utils.checkpoint import load_network, load_weights, read_weights, save_weights, student_weights
from mmwsl.utils.data import check_data, single_labels
from mmwsl.utils.files import whole_file
from mmwsl.utils.launch import finish_run, launcher_parser, prepare_run

__all__ = [
    'check_data', 'finish_run', 'launcher_parser', 'load_network', 'load_weights', 'prepare_run', 'read_weights',
    'save_weights', 'single_labels', 'student_weights', 'whole_file'
]
