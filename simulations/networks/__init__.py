"""The networks that scenarios train, a module for each family.

Each is a factory that a scenario names, with keyword options of ``[model.options]``; what it draws,
it draws from torch's generator, so that a seed gives the same weights everywhere. A network takes
the inputs of its data in their order and returns one tensor, the example first.

================ ====================================================== ==========================
module           factories                                              inputs
================ ====================================================== ==========================
`convolutional`  ``digits_cnn``, ``lenet``, ``narrow_lenet``, ``cnn``,  images, windows of sensors
                 ``conv4``, ``normalised_cnn4``, ``sensor_cnn``
`residual`       ``ResNet``, ``small_resnet_group``,                    images
                 ``small_resnet_batch``
`mobile`         ``mobile_net``                                         images
`recurrent`      ``Lstm``, ``small_lstm``, ``lstm_language_model``      images by row, tokens
`attention`      ``Transformer``, ``small_transformer``,                images by row, tokens
                 ``language_model``, ``lora_language_model``
`graphs`         ``gcn``                                                features and adjacency
`factorisation`  ``matrix_factorisation``, ``ItemScores``               numbers of user and item
`tabular`        ``logistic_regression``, ``mlp``                       rows of a table
`autoencoder`    ``autoencoder``                                        images
================ ====================================================== ==========================
"""
