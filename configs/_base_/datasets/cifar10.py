# What CIFAR-10 changes in a config on CIFAR-100.
cifar10 = dict(
    # of the training set, RGB
    data_preprocessor=dict(num_classes=10, mean=[125.307, 122.961, 113.8575], std=[62.9932, 62.0887, 66.7048]),
    dataset=dict(type='CIFAR10', data_root='data/cifar10'),
    network=dict(head=dict(num_classes=10)),
)
