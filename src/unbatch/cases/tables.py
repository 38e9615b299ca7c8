"""Tables: rows of numbers about people, wines and flowers."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, final

import torch
from pydantic import Field

from unbatch.case import Case, Examples
from unbatch.domain import Table

CUT_AT_DEVIATIONS = 5.0  # standard deviations


@final
class Tables(Case):
    """Rows of numbers about tumours, patients, wines or flowers.

    Rows [d] of standardised columns (mean 0, variance 1 over the table), cut to 5 standard deviations.

    breast-cancer: 569 tumours, 30 columns, malignant or benign. diabetes: 442 patients, 10 columns (age, sex, blood
    values), progression a year later below or above the median. wine: 178 wines, 13 columns, three growers. iris: 150
    flowers, 4 columns, three species. The range is known without the data: that of any standardised, cut column.

    >>> import unbatch
    >>> client = unbatch.cases.Tables(dataset="iris", batch=4).setting()
    >>> client.domain.columns
    ['sepal length', 'sepal width', 'petal length', 'petal width']
    """

    source: ClassVar[str] = (
        "breast-cancer: W. Wolberg, O. Mangasarian, N. Street and W. Street, 1993; wine: S. Aeberhard and M. Forina, "
        "1992; iris: R. Fisher, 1936 (all UCI Machine Learning Repository, CC BY 4.0); diabetes: B. Efron, T. Hastie, "
        "I. Johnstone and R. Tibshirani, Least Angle Regression, 2004 (no licence stated); the copies that "
        "scikit-learn ships"
    )

    dataset: Annotated[
        Literal["breast-cancer", "diabetes", "wine", "iris"], Field(description="table that the rows are from")
    ] = "breast-cancer"

    def pool(self, rng: torch.Generator) -> Examples:
        from sklearn import datasets

        if self.dataset == "diabetes":
            data = datasets.load_diabetes(scaled=False)
            progression = torch.as_tensor(data.target)
            labels = (progression > progression.median()).long()
            classes = ["progression below median", "progression above median"]
        else:
            load = {"breast-cancer": "load_breast_cancer", "wine": "load_wine", "iris": "load_iris"}[self.dataset]
            data = getattr(datasets, load)()
            labels = torch.as_tensor(data.target, dtype=torch.int64)
            classes = [str(name).replace("_", " ") for name in data.target_names]
        rows = torch.as_tensor(data.data, dtype=torch.float64)  # [n, d]
        rows = (rows - rows.mean(0)) / rows.std(0, correction=0)
        order = torch.randperm(len(rows), generator=rng)
        columns = [str(name).replace("_", " ").removesuffix(" (cm)") for name in data.feature_names]
        return Examples(
            inputs=rows[order].clamp(-CUT_AT_DEVIATIONS, CUT_AT_DEVIATIONS),
            labels=labels[order],
            classes=classes,
            domain=Table(shape=(rows.shape[1],), low=-CUT_AT_DEVIATIONS, high=CUT_AT_DEVIATIONS, columns=columns),
        )
